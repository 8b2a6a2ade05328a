"""Pretrain an encoder with any criterion of duality.py. The same command again resumes the run.

python train.py --dataset shapes                             # no download, a minute on two cores
python train.py                                              # CIFAR-10, ResNet-18, VICReg
python train.py --criterion simclr --set temperature=0.15    # any criterion, any hyperparameter
torchrun --nproc-per-node 8 train.py --dataset imagenet --data-dir imagenet --batch-size 1024
"""

import argparse
import inspect
import io
import json
import math
import os
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize
from torchvision.transforms.v2.functional import normalize, rgb_to_grayscale
from tqdm import tqdm

from duality import CRITERIA, diagnose, gather

# defaults that depend on the data set, on the architecture, and on the optimizer
DATASETS = {
    "cifar10": dict(arch="resnet18", epochs=100, image_size=32),
    "cifar100": dict(arch="resnet18", epochs=100, image_size=32),
    "imagenet": dict(arch="resnet50", epochs=100, image_size=224),
    "folder": dict(arch="resnet18", epochs=100, image_size=224),
    "shapes": dict(arch="small", epochs=12, image_size=32),
}
SMALL_DEFAULTS = dict(projector="512-512-512", batch_size=128, optimizer="adamw", grow=0.6)
RESNET_DEFAULTS = dict(projector="2048-2048-2048", batch_size=256, optimizer="lars", grow=0.0)
OPTIMIZERS = {
    "lars": dict(lr=0.1, weight_decay=1e-4),
    "sgd": dict(lr=0.1, weight_decay=1e-4),
    "adamw": dict(lr=2e-3, weight_decay=1e-2),
}
ARCHS = ["small", *torchvision.models.list_models(torchvision.models, include="*resne[tx]*")]
# the augmentation: a crop's least share of the area, strengths from brightness to hue, and
# probabilities of all else
VIEWS = dict(crop=0.2, flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
VIEWS |= dict(grey=0.2, blur=0.0, solarize=0.0)
DRAWS = 14  # random numbers that a view takes
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's red, green and blue
RESIDENT_BYTES = 4 * 2**30  # data sets that fit in this are held on the device, others streamed
MAY_CHANGE = "epochs data_dir workers out save_every compile".split()  # on resuming

# torchrun's processes: how many, the number of this one, and its number on its node
WORLD = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))


# ---- Settings ------------------------------------------------------------------------------------


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the description's lines and shows every option's default."""


def parse_args(argv=None):
    text = f"{__doc__}\nDefaults depend on --dataset, --criterion, --arch, --optimizer, --device."
    parser = argparse.ArgumentParser("train.py", "%(prog)s [options]", text, add_help=False)
    parser.formatter_class = HelpFormatter
    pairs = dict(nargs="+", action="extend", default=[], metavar="NAME=VALUE")
    share, nonnegative = number(float, 0, 1), number(float, 0, 1e9)

    add = parser.add_argument_group("criterion and data").add_argument
    add("--criterion", choices=CRITERIA, default="vicreg", help="a loss of duality.py")
    add("--set", **pairs, help="hyperparameters, e.g. temperature=0.15; a wrong name lists all")
    add("--dataset", choices=DATASETS, default="cifar10", help="what to train on")
    add("--data-dir", type=path, default="data", help="holds train/CLASS/IMAGE, or CIFAR")
    add("--image-size", type=number(int, 8, 1024), metavar="PIXELS", help="side of a view")
    add("--views", **pairs, help="augmentation, e.g. grey=0.1 blur=0.5; a wrong name lists all")
    add("--workers", type=number(int, 0, 256), default=min(8, os.cpu_count()), help="image readers")

    add = parser.add_argument_group("model and optimization").add_argument
    add("--arch", choices=ARCHS, metavar="NAME", help="small, or one of torchvision's ResNets")
    add("--projector", type=widths, metavar="N-N-N", help="widths of the projector's layers")
    add("--epochs", type=number(int, 1, 10**6), help="passes over the data")
    add("--batch-size", type=number(int, 2, 10**6), help="of all processes together")
    add("--optimizer", choices=OPTIMIZERS, help="of encoder and projector")
    add("--lr", type=nonnegative, help="times batch size / 256, except with adamw")
    add("--weight-decay", type=nonnegative, help="of weights, not of biases and norms")
    add("--warmup", type=share, default=0.05, help="share of steps in which the rate rises")
    add("--grow", type=share, help="share of steps, from the first, at 5/8 of the image size")

    add = parser.add_argument_group("running").add_argument
    add("--device", choices=devices(), default=devices()[0], help="to train on")
    add("--precision", choices=["bf16", "fp16", "fp32"], help="of the network; the loss is in fp32")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of everything random")
    add("--out", type=path, help="the run's folder")
    add("--save-every", type=nonnegative, default=120, help="seconds between checkpoints")
    add("--compile", action="store_true", help="torch.compile; with torchrun not the network")

    # parse twice: the first pass only finds what the defaults depend on
    chosen, _ = parser.parse_known_args(argv)
    defaults = DATASETS[chosen.dataset] | dict(out=f"runs/{chosen.dataset}-{chosen.criterion}")
    defaults |= SMALL_DEFAULTS if (chosen.arch or defaults["arch"]) == "small" else RESNET_DEFAULTS
    defaults |= OPTIMIZERS[chosen.optimizer or defaults["optimizer"]]
    parser.set_defaults(**defaults, precision=fastest_precision(chosen.device))
    add("-h", "--help", action="help", default=argparse.SUPPRESS, help="show this and exit")
    args = parser.parse_args(argv)
    check(args, parser)
    return args


def number(kind, least, most):
    """An option's type: a number from least to most."""

    def parse(text):
        if not least <= kind(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        return kind(text)

    parse.__name__ = kind.__name__  # for argparse's messages
    return parse


def widths(text):
    """An option's type: layer widths such as 2048-2048-512."""
    return [number(int, 1, 99999)(width) for width in text.split("-")]


def path(text):
    return os.path.abspath(os.path.expanduser(text))


def check(args, parser):
    """Completes --set and --views, and tries the criterion before any data are read."""
    if args.batch_size % WORLD or args.batch_size < 2 * WORLD:
        parser.error(f"--batch-size must be a multiple of {WORLD}, and at least {2 * WORLD}")
    parameters = inspect.signature(CRITERIA[args.criterion]).parameters.values()
    hyperparameters = {p.name: p.default for p in parameters if p.default is not p.empty}
    try:
        args.set = keywords(args.set, hyperparameters)
        args.views = keywords(args.views, VIEWS)
        CRITERIA[args.criterion](*torch.randn(2, args.batch_size, args.projector[-1]), **args.set)
    except (ArithmeticError, RuntimeError, ValueError) as error:
        parser.error(str(error))
    if not all(0 <= value <= 1 for value in args.views.values()):
        parser.error("a value of --views is not between 0 and 1")


def keywords(pairs, defaults):
    """The defaults, updated by texts NAME=VALUE, each in its default's type."""
    found = dict(defaults)
    for name, _, text in (pair.partition("=") for pair in pairs):
        try:
            kind = type(defaults[name])
            found[name] = {"True": True, "False": False}[text] if kind is bool else kind(text)
        except (KeyError, ValueError):
            choices = ", ".join(f"{name}={default!r}" for name, default in defaults.items())
            raise ValueError(f"{name}={text}: choose from {choices}") from None
    return found


# ---- Processes and devices -----------------------------------------------------------------------


def devices():
    """The kinds of devices here, the fastest first."""
    mps = torch.backends.mps.is_available() and WORLD == 1  # gloo and NCCL send no MPS tensors
    here = dict(cuda=torch.cuda.is_available(), mps=mps, cpu=True)
    return [device for device in here if here[device]]


def fastest_precision(device):
    if device == "cuda":  # older GPUs emulate bf16, slowly
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device == "cpu" and torch.cpu._is_avx512_bf16_supported() else "fp32"


def start(device, precision):
    """Selects this process's GPU, and joins torchrun's processes, if there are any."""
    gpu = torch.device("cuda", LOCAL_RANK) if device == "cuda" else None
    if gpu:
        torch.cuda.set_device(gpu)
        torch.backends.cudnn.benchmark = True  # shapes hardly ever change
        torch.backends.cudnn.allow_tf32 = precision != "fp32"
        # "high" is TF32: as precise as fp16, more so than bf16
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    if WORLD > 1:
        if "MASTER_ADDR" not in os.environ:
            sys.exit("WORLD_SIZE is set: start several processes with torchrun")
        hour = timedelta(hours=1)  # the first process may have to download the data
        dist.init_process_group("nccl" if gpu else "gloo", timeout=hour, device_id=gpu)


def autocast(args):
    dtype = torch.float16 if args.precision == "fp16" else torch.bfloat16
    return torch.autocast(args.device, dtype, enabled=args.precision != "fp32")


def memory_format(device):
    # in channels_last, MPS computes a wrong gradient of batch norm (pytorch issue 175189)
    return torch.contiguous_format if device == "mps" else torch.channels_last


def say(message):
    if RANK == 0:
        tqdm.write(message, sys.stderr)  # above the progress bar


def generator(device, *key):
    """A random generator that depends only on its key, some integers."""
    return torch.Generator(device).manual_seed(hash(key) % 2**63)


# ---- Data ----------------------------------------------------------------------------------------


def read_image(file, size):
    """The image in RGB. OSError names a file that is damaged, or grey in more than 8 bits."""
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"mode {image.mode} has more than 8 bits a channel")
            image.draft("RGB", (2 * size, 2 * size))  # reads a large JPEG smaller
            return image.convert("RGB")
    except Exception as error:  # PIL raises all kinds of errors
        raise OSError(f"{file}: {error}") from error


def shapes(n, seed, size=32, device="cpu"):
    """Drawn images, uint8 (n, 3, size, size), of flowers with 1 to 8 petals, and labels (n,)."""
    draw = partial(torch.rand, generator=generator("cpu", seed))
    labels = torch.arange(n) % 8
    petals = 1 + labels.view(n, 1, 1, 1)
    left, top, radius, phase, angle, frequency, inverted = draw(7, n, 1, 1, 1)
    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    # the flower appears twice in each direction, so that most crops show it
    u = (x + left) % 1 - 0.5
    v = (y + top) % 1 - 0.5
    edge = (0.25 + 0.1 * radius) * (1 + 0.5 * (petals * torch.atan2(v, u) + 7 * phase).sin())
    flower = (size * (edge - u.hypot(v))).sigmoid()
    waves = ((2 + 13 * frequency) * ((4 * angle).cos() * x + (4 * angle).sin() * y)).sin()
    dark, light, contrast = draw(3, n, 3, 1, 1)
    images = torch.lerp(dark / 2, light / 2 + 0.5, flower) + (contrast - 0.5) * waves / 2.5
    images = torch.where(inverted < 0.5, images, 1 - images)
    return (images.clamp(0, 1) * 255).byte().to(device), labels.to(device)


def load(args):
    """Training set, test set, and the names of the classes.

    Images are central squares, uint8 (3, P, P); P is a view's size, or twice that if streamed.
    """
    size, root = args.image_size, Path(args.data_dir)
    if args.dataset == "shapes":
        sets = [shapes(5000, 0, size, args.device), shapes(2000, 1, size, args.device)]
        return *(TensorDataset(*tensors) for tensors in sets), range(1, 9)
    cifar = args.dataset.startswith("cifar")
    try:
        if cifar:
            kind = getattr(torchvision.datasets, args.dataset.upper())
            sets = [kind(root, train, download=True) for train in (True, False)]
        else:
            test = "val" if (root / "val").is_dir() else "test"
            read = partial(read_image, size=size)
            sets = [ImageFolder(root / part, loader=read) for part in ("train", test)]
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        needed = "its archive (or try shapes)" if cifar else "train/CLASS/IMAGE and val/CLASS/IMAGE"
        sys.exit(f"{args.dataset}: {reason}; --data-dir DIR must have {needed}")
    classes = sets[0].classes
    unmatched = set(classes) ^ set(sets[1].classes)
    if unmatched:
        sys.exit(f"class {min(unmatched)} is not in both {sets[0].root} and {sets[1].root}")
    fit = sum(map(len, sets)) * 3 * size**2 <= RESIDENT_BYTES
    side = size if fit else 2 * size
    for i, data in enumerate(sets):
        data.transform = Compose([Resize(side), CenterCrop(side), PILToTensor()])
        if fit:
            batches = fetch(data, torch.arange(len(data)).split(100), args)
            batches = tqdm(batches, "reading images", leave=False, disable=RANK > 0 or None)
            sets[i] = TensorDataset(*map(torch.cat, zip(*batches)))
    return *sets, classes


def fetch(data, batches, args):
    """Iterates over images, uint8 (B, 3, P, P), and labels (B,), on the device, by indices."""
    cuda = args.device == "cuda"
    move = partial(torch.Tensor.to, device=args.device, non_blocking=cuda)
    if isinstance(data, TensorDataset):
        return (data[move(indices)] for indices in batches)
    lists = (indices.tolist() for indices in batches)
    loader = DataLoader(data, batch_sampler=lists, num_workers=args.workers, pin_memory=cuda)
    return (map(move, batch) for batch in loader)


def plain_batches(data, args, rank=0, world=1):
    """Yields a process's share of the images, normalized (B, 3, S, S), and labels (B,)."""
    indices = torch.arange(len(data))[rank::world]
    for images, labels in fetch(data, indices.split(100), args):
        images = F.adaptive_avg_pool2d(images / 255, args.image_size)  # halves streamed ones
        yield normalize(images, MEAN, STD), labels


def training_batches(data, args, first):
    """Yields views (2B, 3, S, S), a's before b's, and labels (B,) of this process, from step first.

    They depend on the seed and the step, not on the number of processes or on what came before.
    """
    size = args.batch_size
    per_epoch = len(data) // size
    operations = torch.compile(augment, dynamic=False) if args.compile else augment
    for epoch in range(first // per_epoch, args.epochs):
        order = torch.randperm(len(data), generator=generator("cpu", args.seed, epoch))
        begin = max(first, epoch * per_epoch)  # a resumed epoch goes on in its middle
        batches = order.split(size)[begin % per_epoch : per_epoch]
        shares = [indices.chunk(WORLD)[RANK] for indices in batches]
        for step, (images, labels) in enumerate(fetch(data, shares, args), begin):
            grown = step >= args.grow * args.epochs * per_epoch
            side = args.image_size if grown else max(8, args.image_size * 5 // 8)
            # the 0 tells the key from those of the epochs' orders
            draw = generator(args.device, args.seed, step, 0)
            draws = torch.rand(2, WORLD, len(labels), DRAWS, generator=draw, device=args.device)
            draws = draws[:, RANK].flatten(0, 1)  # the same numbers for any number of processes
            # on a CPU as many views at a time as a core's cache holds
            chunk = max(1, 2**16 // side**2) if args.device == "cpu" else len(draws)
            pairs = zip(images.repeat(2, 1, 1, 1).split(chunk), draws.split(chunk))
            views = torch.cat([operations(*pair, args.views, side) for pair in pairs])
            yield views.to(memory_format=memory_format(args.device)), labels


# ---- Views ---------------------------------------------------------------------------------------


def augment(images, draws, recipe, size):
    """Random views (B, 3, size, size), normalized, of square uint8 images (B, 3, P, P).

    draws (B, DRAWS) are uniform in [0, 1), recipe is a dict such as VIEWS.
    """
    numbers = draws.T[..., None, None, None].split([2, 2, 2, 4, 4])  # (B, 1, 1, 1) each
    (area, aspect), corners, (flip, jitter), shifts, (grey, blurred, sigma, solarized) = numbers

    # torchvision draws a crop again if one of its sides is longer than the image's; here it is cut
    pixels = images.shape[-1]
    area = (recipe["crop"] + (1 - recipe["crop"]) * area) * pixels**2
    aspect = (math.log(4 / 3) * (recipe["crop"] < 1) * (2 * aspect - 1)).exp()
    lengths = torch.stack([area / aspect, area * aspect]).sqrt().round().clamp(1, pixels)
    starts = (corners * (pixels - lengths + 1)).floor()
    flips = torch.stack([torch.zeros_like(flip), (flip < recipe["flip"]).float()])
    rows, columns = resampling(starts, lengths, flips, pixels, size)

    shifts = (jitter < recipe["jitter"]) * (2 * shifts - 1)
    strengths = [recipe[name] for name in ("brightness", "contrast", "saturation", "hue")]
    brightness, contrast, saturation, hue = map(torch.mul, shifts, strengths)
    rows.mul_((1 + brightness) / 255)  # here it is cheaper than on the pixels
    x = (images.float().flatten(1, 2) @ columns[:, 0].mT).unflatten(1, (3, pixels))
    x = (rows @ x).clamp_(0, 1)  # (B, 3, size, size); from here in place, for the cache's sake
    center = rgb_to_grayscale(x.mean((2, 3), keepdim=True))
    x.mul_(1 + contrast).sub_(contrast * center).clamp_(0, 1)
    x.lerp_(rgb_to_grayscale(x), -saturation).clamp_(0, 1)
    x = turn_hue(x, hue)
    x.lerp_(rgb_to_grayscale(x), (grey < recipe["grey"]).float())
    if recipe["blur"] > 0:
        x = blur(x, (blurred < recipe["blur"]) * (0.1 + 1.9 * sigma))
    if recipe["solarize"] > 0:
        x = torch.where((solarized < recipe["solarize"]) & (x > 0.5), 1 - x, x)
    # unlike normalize, this copies nothing to the device
    for channel, mean, std in zip(x.unbind(1), MEAN, STD):
        channel.sub_(mean).div_(std)
    return x


def resampling(start, length, flip, pixels, size):
    """Antialiased resize of pixels [start, start + length) to size, as weights (size, pixels)."""
    # the weight of the pixel at x, seen from start, in the output at y is
    # max(0, max(1, scale) - |x - scale y|) over their sum,  scale = length / size
    scale = length / size
    x = torch.arange(pixels, device=start.device) + 0.5 - start
    x = torch.where((x > 0) & (x < length), x, math.inf)  # others have no weight
    y = torch.arange(size, device=start.device)[:, None] + 0.5
    y = (flip * size - y).abs()  # a flipped view goes backwards from its right edge
    weights = (x - scale * y).abs_().sub_(scale.clamp(min=1)).clamp_(max=0)  # times -1
    return weights.div_(weights.sum(-1, keepdim=True))


def turn_hue(x, turn):
    """Colors (B, 3, S, S) with their hues turned by turn (B, 1, 1, 1) of a circle, as in HSV."""
    red, green, blue = x.split(1, 1)
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = (high - low).clamp_(min=1e-12)
    # hue as a share of the circle: 0 is red, 1/2 cyan, and below 0 blue > green; its size is
    # u = |green - blue| / (6 chroma) where red is highest, 1/2 - u where red is lowest, and
    # between them it falls from 1/3 to 1/6 as red rises, while u is 1/6: one lerp is all three
    hue = (green - blue).div_(chroma).div_(6)
    u = hue.abs()
    hue = (0.5 - u).lerp_(u, (red - low).div_(chroma)).copysign_(hue)
    hue.add_(turn + 2).frac_().mul_(6)  # from here in sixths of the circle, 0 to 6
    # high - chroma clamp(d - 1, 0, 1),  d = | |hue - k| - 3 | sixths from the channel's own hue,
    # k = 3, 5, 7 for red, green, blue
    k = torch.arange(3, 8, 2, device=x.device)[:, None, None]
    d = (hue - k).abs_().sub_(3).abs_()
    return torch.addcmul(high.add_(chroma), chroma, d.clamp_(1, 2), value=-1)


def blur(x, sigma):
    """Gaussian blur of x (B, 3, S, S) by sigma (B, 1, 1, 1) pixels, reflected at the edges."""
    size = x.shape[-1]
    radius = max(1, size // 20)
    offset = torch.arange(-radius, size + radius, device=x.device)
    offset = offset - torch.arange(size, device=x.device)[:, None]  # (S, S + 2 radius)
    kernel = (-0.5 * (offset / sigma.clamp(min=1e-3)) ** 2).exp() * (offset.abs() <= radius)
    kernel = kernel / kernel.sum(-1, keepdim=True)
    return kernel @ F.pad(x, [radius] * 4, "reflect") @ kernel.mT


# ---- Model and optimizer -------------------------------------------------------------------------


class Model(nn.Module):
    """Images (B, 3, S, S) -> embeddings (B, D), and logits (B, classes) of the online probe, which
    sends no gradient to the encoder."""

    def __init__(self, arch, image_size, projector, classes):
        super().__init__()
        self.encoder, features = small() if arch == "small" else resnet(arch, image_size)
        mlp = torchvision.ops.MLP
        self.projector = mlp(features, projector, norm_layer=nn.BatchNorm1d, bias=False)
        self.probe = nn.Linear(features, classes)

    def forward(self, images):
        features = self.encoder(images)
        return self.projector(features), self.probe(features.detach())


def small():
    """An encoder for CPUs, and its number of features."""
    layers = []
    for width, n in [(3, 32), (32, 64), (64, 128), (128, 256)]:
        pool = nn.MaxPool2d(2, ceil_mode=True) if n < 256 else nn.Identity()
        convolution = nn.Conv2d(width, n, 3, padding=1, bias=False)
        layers += [convolution, pool, nn.BatchNorm2d(n), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 256


def resnet(arch, image_size):
    """torchvision's ResNet, up to 64 pixels with a 3x3 stem and no max-pool; its features."""
    encoder = torchvision.models.get_model(arch, weights=None)
    features = encoder.fc.in_features
    encoder.fc = nn.Identity()
    if image_size <= 64:
        encoder.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        encoder.maxpool = nn.Identity()
    return encoder, features


class LARS(torch.optim.SGD):
    """SGD with gradients of norm eta |w| for weights, not biases and norms (arXiv 1708.03888)."""

    @torch.no_grad()
    def step(self, eta=0.02):
        for group in self.param_groups:
            for w in group["params"]:
                if w.ndim > 1:
                    # g <- (g + decay w) eta |w| / |g + decay w|, unless one of the norms is 0
                    decay = group["weight_decay"] * w
                    g = w.grad + decay
                    ratio = eta * w.norm() / g.norm()
                    g = g * torch.where((ratio > 0) & ratio.isfinite(), ratio, 1)
                    w.grad = g - decay  # SGD adds the decay
        super().step()


def build_optimizers(args, model):
    """The optimizers of the network, without weight decay of biases and norms, and of the probe."""
    params = [*model.encoder.parameters(), *model.projector.parameters()]
    groups = [
        dict(params=[p for p in params if p.ndim > 1], weight_decay=args.weight_decay),
        dict(params=[p for p in params if p.ndim <= 1], weight_decay=0),
    ]
    probe = torch.optim.AdamW(model.probe.parameters(), 1e-2, weight_decay=0, fused=True)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, args.lr, fused=True), probe
    kind = LARS if args.optimizer == "lars" else torch.optim.SGD
    return kind(groups, args.lr * args.batch_size / 256, momentum=0.9), probe


def schedule(step, steps, warmup):
    """The share of the learning rate at a step: a linear rise, then half a cosine."""
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    return (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2


def distribute(model, args):
    """The model, with gradients and batch norms of all processes' batch."""
    if WORLD == 1:
        return model
    if args.device == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:  # torch's SyncBatchNorm refuses CPUs: gather the batch before, take the own part after
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.register_forward_pre_hook(gather_batch)
                module.register_forward_hook(take_part)
    return nn.parallel.DistributedDataParallel(model)


def gather_batch(module, inputs):
    return gather(*inputs) if module.training else None


def take_part(module, inputs, output):
    return output.chunk(WORLD)[RANK].clone() if module.training else None


# ---- The run -------------------------------------------------------------------------------------


class Run:
    """A run's folder, in which the first process writes log.jsonl, encoder.pt and checkpoint.pt."""

    def __init__(self, args, parts):
        """Continues from the folder's checkpoint; parts are all that has a state, by name."""
        self.out, self.settings, self.parts, self.log = Path(args.out), vars(args), parts, []
        self.written, self.saved_at = self.time_written(), time.perf_counter()
        if RANK == 0 and not self.written:
            self.save(0)
        found = [load_checkpoint(self.out) if RANK == 0 else None]
        if WORLD > 1:
            dist.broadcast_object_list(found)
        (saved,) = found
        for name, value in self.settings.items():
            old = saved["settings"].get(name)
            if old != value and name not in MAY_CHANGE:
                sys.exit(f"{self.out} has a run with {name} {old}, not {value}: name another --out")
        self.step, self.log = saved["step"], saved["log"]
        if self.step > 0 and saved["settings"]["epochs"] < args.epochs:
            say("more --epochs: learning rate and views' size are again those of the longer run")
        for name, part in parts.items():
            part.load_state_dict(saved["states"][name])

    def time_written(self):
        file = self.out / "checkpoint.pt"
        return file.stat().st_mtime_ns if file.exists() else None

    def save(self, step):
        """Writes each of the files as a whole or not at all."""
        if self.time_written() != self.written:
            sys.exit(f"another run writes to {self.out}, so this one ends: name another --out")
        states = {name: part.state_dict() for name, part in self.parts.items()}
        if not all(weight.isfinite().all() for weight in states["model"].values()):
            sys.exit(f"weights are not finite at step {step}; {self.out} keeps its checkpoint")
        saved = dict(settings=self.settings, step=step, log=self.log, states=states)
        lines = "".join(json.dumps(record) + "\n" for record in self.log)
        files = {
            "log.jsonl": lines.encode(),
            "encoder.pt": serialized(self.parts["model"].encoder.state_dict()),
            "checkpoint.pt": serialized(saved),
        }
        self.out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (self.out / "part").write_bytes(content)
            os.replace(self.out / "part", self.out / name)
        self.written, self.saved_at = self.time_written(), time.perf_counter()


def serialized(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def load_checkpoint(folder):
    """A checkpoint, a dict, or None if there is none."""
    file = Path(folder) / "checkpoint.pt"
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        return {name: saved[name] for name in ("settings", "step", "log", "states")}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:
        reason = f"damaged or of another version of train.py ({type(error).__name__})"
        sys.exit(f"{file} is {reason}: move it away or name another folder")


@torch.no_grad()
def probe_accuracy(model, data, args):
    """Top-1 of the online probe on a set's images, in %."""
    model.eval()
    right = torch.zeros((), device=args.device)
    for images, labels in plain_batches(data, args, RANK, WORLD):
        with autocast(args):
            _, logits = model(images)
        right += (logits.argmax(1) == labels).sum()
    model.train()
    return 100 * gather(right[None]).sum().item() / len(data)


def train(args, run, train_set, test_set):
    model, optimizer, probe_optimizer, scaler = run.parts.values()
    criterion = partial(CRITERIA[args.criterion].terms, **args.set)
    net = distribute(model, args)
    if args.compile:
        criterion = torch.compile(criterion)
        if WORLD == 1:  # torch does not compile SyncBatchNorm
            net = torch.compile(net, dynamic=False)
    per_epoch = len(train_set) // args.batch_size
    steps = args.epochs * per_epoch
    batches = training_batches(train_set, args, run.step)
    bar = tqdm(total=steps, initial=run.step, unit="step", disable=RANK > 0)
    began, logged = time.perf_counter(), run.step
    for step, (views, labels) in enumerate(batches, run.step):
        lr = optimizer.defaults["lr"] * schedule(step, steps, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with autocast(args):
            embeddings, logits = net(views)
        za, zb = (gather(z) for z in embeddings.chunk(2))  # the whole batch, with its gradients
        terms = criterion(za, zb)
        loss = sum(terms.values())
        labels = labels.repeat(2)
        probe_loss = F.cross_entropy(logits.float(), labels)
        scaler.scale(loss + probe_loss).backward()
        for each in (optimizer, probe_optimizer):
            scaler.step(each)
            each.zero_grad()
        scaler.update()

        bar.update()
        done = step + 1
        epoch_ends = done % per_epoch == 0
        if done % 20 == 0 or epoch_ends:  # at other steps the host does not wait for a GPU
            top1 = 100 * (logits.argmax(1) == labels).float().mean()
            values = torch.stack([*terms.values(), loss, top1]).detach()
            values = gather(values[None]).mean(0)  # over processes
            record = dict(zip([*terms, "loss", "probe_train"], values.tolist()), step=done, lr=lr)
            speed = (done - logged) * args.batch_size / (time.perf_counter() - began)
            record["samples_per_s"] = speed
            if epoch_ends:
                record |= {name: value.item() for name, value in diagnose(za.detach()).items()}
                record["probe_test"] = probe_accuracy(model, test_set, args)
                say(f"epoch {done // per_epoch}: test accuracy {record['probe_test']:.1f} %")
            if not math.isfinite(record["loss"]):
                sys.exit(f"not finite: {record}; {run.out} keeps its checkpoint")
            run.log.append(record)
            bar.set_postfix_str(f"loss {loss:.4g}, probe {top1:.1f} %, {speed:.0f} samples/s")
            began, logged = time.perf_counter(), done
        overdue = time.perf_counter() - run.saved_at > args.save_every
        if RANK == 0 and (overdue or done == steps):
            run.save(done)
    bar.close()


def main(args):
    start(args.device, args.precision)
    for turn in range(3):  # one process, then one of each other node, then all others
        if turn == (RANK > 0) + (LOCAL_RANK > 0):
            train_set, test_set, classes = load(args)
        if WORLD > 1:
            dist.barrier()
    args.images, args.classes = len(train_set), len(classes)
    if args.images < args.batch_size:
        sys.exit(f"--batch-size {args.batch_size}: there are only {args.images} training images")
    torch.manual_seed(args.seed)
    model = Model(args.arch, args.image_size, args.projector, args.classes)
    model.to(args.device, memory_format=memory_format(args.device))
    optimizer, probe_optimizer = build_optimizers(args, model)
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")
    parts = dict(model=model, optimizer=optimizer, probe_optimizer=probe_optimizer, scaler=scaler)
    run = Run(args, parts)
    if run.step >= args.epochs * (args.images // args.batch_size):
        return say(f"{run.out} is complete; more --epochs resume the run")
    say(
        f"{args.criterion}, {args.arch}: {args.images} images of {args.classes} classes,"
        f" {len(test_set)} test images; {WORLD} x {args.device} {args.precision}; {run.out}"
    )
    train(args, run, train_set, test_set)
    say(f"next: python eval.py {run.out}")


if __name__ == "__main__":
    args = parse_args()
    try:
        main(args)
    except OSError as error:  # an image reader's message has a traceback before it
        sys.exit(f"train.py: {str(error).strip().splitlines()[-1]}")
    except KeyboardInterrupt:
        saved = load_checkpoint(args.out) or dict(step=0)
        say(f"stopped; the same command goes on from step {saved['step']}")
        sys.exit(1)
    if WORLD > 1:
        dist.destroy_process_group()
