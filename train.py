"""Pretrain an encoder with any criterion of duality.py. The same command again resumes the run.

python train.py --dataset shapes                             # no download, a minute on two cores
python train.py                                              # CIFAR-10, ResNet-18, VICReg
python train.py --criterion simclr --set temperature=0.15    # any criterion, any hyperparameter
torchrun --nproc-per-node 8 train.py --dataset imagenet --data-dir imagenet --batch-size 1024
"""

import argparse
import ast
import datetime
import inspect
import io
import json
import math
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import normalize, pil_to_tensor
from tqdm import tqdm

from duality import CRITERIA, diagnose, gather

DATASETS = {
    "cifar10": dict(arch="resnet18", epochs=100, image_size=32),
    "cifar100": dict(arch="resnet18", epochs=100, image_size=32),
    "imagenet": dict(arch="resnet50", epochs=100, image_size=224),
    "folder": dict(arch="resnet18", epochs=100, image_size=224),
    "shapes": dict(arch="small", epochs=12, image_size=32),
}
SMALL = dict(projector="512-512-512", batch_size=128, optimizer="adamw", grow=0.6)
RESNET = dict(projector="2048-2048-2048", batch_size=256, optimizer="lars", grow=0.0)
OPTIMIZERS = {
    "lars": dict(lr=0.1, weight_decay=1e-4),
    "sgd": dict(lr=0.1, weight_decay=1e-4),
    "adamw": dict(lr=2e-3, weight_decay=1e-2),
}
ARCHS = ["small", *torchvision.models.list_models(torchvision.models, include="*resne[tx]*")]
# The augmentation: least area of a crop; probabilities of a flip and of color jitter; the jitter's
# strengths; probabilities of grey, blur and solarization. All are in [0, 1].
VIEWS = dict(crop=0.2, flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
VIEWS |= dict(grey=0.2, blur=0.0, solarize=0.0)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's red, green and blue
RESIDENT_BYTES = 4 * 2**30  # images that fit in this are held on the device, others are streamed
MAY_CHANGE = "epochs data_dir workers device precision out save_every compile".split()

# torchrun's processes: how many, the number of this one, and its number on its node
WORLD = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))


# ---- Settings ------------------------------------------------------------------------------------


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the description's lines and shows every option's default."""


def parse_args(argv=None):
    text = f"{__doc__}\nDefaults depend on --dataset, --criterion, --arch and --optimizer."
    parser = argparse.ArgumentParser("train.py", "%(prog)s [options]", text, add_help=False)
    parser.formatter_class = HelpFormatter
    pairs = dict(nargs="+", action="extend", default=[], metavar="NAME=VALUE")

    add = parser.add_argument_group("criterion and data").add_argument
    add("--criterion", choices=CRITERIA, default="vicreg", help="a loss of duality.py")
    add("--set", **pairs, help="hyperparameters, e.g. temperature=0.15; a wrong name lists all")
    add("--dataset", choices=DATASETS, default="cifar10", help="what to train on")
    add("--data-dir", type=path, default="data", help="holds train/CLASS/IMAGE, or CIFAR")
    add("--image-size", type=number(int, 8, 1024), metavar="PIXELS", help="side of a view")
    add("--views", **pairs, help="augmentation, e.g. grey=0.1 blur=0.5; a wrong name lists all")
    add("--workers", type=number(int, 0, 256), default=cores(), help="processes that read images")

    add = parser.add_argument_group("model and optimization").add_argument
    add("--arch", choices=ARCHS, metavar="NAME", help="small, or one of torchvision's ResNets")
    add("--projector", type=widths, metavar="N-N-N", help="widths of the projector's layers")
    add("--epochs", type=number(int, 1, 1e6), help="passes over the data")
    add("--batch-size", type=number(int, 2, 1e6), help="of all processes together")
    add("--optimizer", choices=OPTIMIZERS, help="of encoder and projector")
    add("--lr", type=number(float, 0, 1e9), help="times batch size / 256, except with adamw")
    add("--weight-decay", type=number(float, 0, 1e9), help="of weights, not of biases and norms")
    add(
        "--warmup",
        type=number(float, 0, 1),
        default=0.05,
        help="share of the steps in which the rate rises",
    )
    add(
        "--grow",
        type=number(float, 0, 1),
        help="share of the steps, from the first, at 5/8 the size",
    )

    add = parser.add_argument_group("running").add_argument
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="to train on")
    precisions = ["auto", "bf16", "fp16", "fp32"]
    add("--precision", choices=precisions, default="auto", help="auto is the fastest")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of everything random")
    add("--out", type=path, help="the run's folder")
    add("--save-every", type=number(float, 0, 1e9), default=120, help="seconds between saves")
    add("--compile", action="store_true", help="torch.compile network, criterion and views")

    chosen, _ = parser.parse_known_args(argv)
    defaults = DATASETS[chosen.dataset] | dict(out=f"runs/{chosen.dataset}-{chosen.criterion}")
    defaults |= SMALL if (chosen.arch or defaults["arch"]) == "small" else RESNET
    defaults |= OPTIMIZERS[chosen.optimizer or defaults["optimizer"]]
    parser.set_defaults(**defaults)
    add("-h", "--help", action="help", default=argparse.SUPPRESS, help="show this and exit")
    args = parser.parse_args(argv)
    check(args, parser)
    return args


def number(kind, least, most):
    """An option's type: a number from least to most."""

    def parse(text):
        if not least <= kind(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least:g} and {most:g}")
        return kind(text)

    parse.__name__ = kind.__name__  # for argparse's messages
    return parse


def widths(text):
    """An option's type: layer widths such as 2048-2048-512."""
    for width in text.split("-"):
        number(int, 1, 99999)(width)
    return text


def path(text):
    return os.path.abspath(os.path.expanduser(text))


def cores():
    """How many cores there are for each of the node's processes, at most eight."""
    linux = hasattr(os, "sched_getaffinity")
    n = len(os.sched_getaffinity(0)) if linux else os.cpu_count()
    return max(1, min(8, n // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def check(args, parser):
    """Completes --set and --views, and tries the criterion before any data are read."""
    if args.batch_size % WORLD or args.batch_size < 2 * WORLD:
        parser.error(f"--batch-size must be a multiple of {WORLD}, and at least {2 * WORLD}")
    parameters = inspect.signature(CRITERIA[args.criterion]).parameters.values()
    hyperparameters = {p.name: p.default for p in parameters if p.default is not p.empty}
    try:
        args.set = keywords("--set", args.set, hyperparameters)
        args.views = keywords("--views", args.views, VIEWS)
    except ValueError as error:
        parser.error(str(error))
    if not all(0 <= value <= 1 for value in args.views.values()):
        parser.error("a value of --views is not between 0 and 1")
    views = torch.randn(2, args.batch_size, int(args.projector.split("-")[-1]))
    try:
        CRITERIA[args.criterion](*views, **args.set)
    except (ArithmeticError, RuntimeError, ValueError) as error:
        parser.error(f"--set or --projector: {error}")


def keywords(option, pairs, defaults):
    """The defaults, updated by NAME=VALUE texts in their types."""
    found = dict(defaults)
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            kind = type(defaults[name])
            value = text if kind is str else ast.literal_eval(text)
            found[name] = kind(value)
            if found[name] != value:
                raise ValueError
        except (KeyError, SyntaxError, TypeError, ValueError):
            choices = ", ".join(f"{name}={default!r}" for name, default in defaults.items())
            raise ValueError(f"{option} {pair}: choose from {choices}") from None
    return found


# ---- Processes and devices -----------------------------------------------------------------------


def start(args):
    """Joins torchrun's processes, if there are any, and sets args.precision. Returns the device."""
    # neither gloo nor NCCL sends MPS tensors
    mps = torch.backends.mps.is_available() and WORLD == 1
    available = dict(cuda=torch.cuda.is_available(), mps=mps, cpu=True)
    kind = args.device
    if kind == "auto":
        kind = next(name for name in available if available[name])
    if not available[kind]:
        sys.exit(f"--device {kind}: there is none for {WORLD} process(es) here")
    if args.precision == "auto":
        fast_on_cpu = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        args.precision = "bf16" if kind == "cpu" and fast_on_cpu else "fp32"
        if kind == "cuda":  # older GPUs emulate bf16, slowly
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            args.precision = "bf16" if bf16 else "fp16"
    device = torch.device(kind, LOCAL_RANK if kind == "cuda" else 0)
    if kind == "cuda":
        if LOCAL_RANK >= torch.cuda.device_count():
            sys.exit(f"--nproc-per-node is more than the {torch.cuda.device_count()} GPU(s) here")
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # shapes hardly ever change
        if args.precision != "fp32":  # TF32 has more bits than bf16 and fp16
            torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    if WORLD > 1:
        if "MASTER_ADDR" not in os.environ:
            sys.exit("WORLD_SIZE is set: start several processes with torchrun")
        hour = datetime.timedelta(hours=1)  # the first process may have to download the data
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=hour)
    return device


def memory_format(device):
    # in channels_last, MPS computes a wrong gradient of batch norm (pytorch issue 175189)
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def average(tensor):
    """The mean of all processes' tensors."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor / WORLD


def say(message):
    if RANK == 0:
        tqdm.write(message, sys.stderr)  # above the progress bar


def generator(device, *key):
    """A random generator that depends on nothing but its key, some integers."""
    return torch.Generator(device).manual_seed(hash(key) % 2**63)


# ---- Data ----------------------------------------------------------------------------------------
# A set has labels (N,); set[indices, seed] is images (k, B, 3, H, W), uint8, and labels (B,).


class Held:
    """Images (N, 3, H, W) in memory: k = 1, whatever the seed is."""

    def __init__(self, images, labels, device):
        self.images = images.to(device)
        self.labels = labels.to(device)

    def __getitem__(self, key):
        indices, _ = key
        return self.images[indices][None], self.labels[indices]


class Folder(torchvision.datasets.ImageFolder):
    """Images on disk: two random crops by the seed or, if it is None, the central square."""

    def __init__(self, root, size, least_area):
        super().__init__(root)
        self.labels = torch.tensor(self.targets)
        self.size = size
        self.random_crop = RandomResizedCrop(size, (least_area, 1))

    def __getitem__(self, key):
        indices, seed = key
        crops = [self.crops(i, seed) for i in indices.tolist()]
        return torch.stack(crops, 1), self.labels[indices]

    def crops(self, i, seed):
        file, _ = self.samples[i]
        image = read_image(file, self.size)
        if seed is None:
            crops = [ImageOps.fit(image, (self.size, self.size), Image.Resampling.BILINEAR)]
        else:
            torch.default_generator.manual_seed(hash((seed, i)) % 2**63)
            crops = [self.random_crop(image), self.random_crop(image)]
        return torch.stack([pil_to_tensor(crop) for crop in crops])


def read_image(file, size):
    """The image in RGB. OSError names a file that is damaged or has more than 8 bits a channel."""
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"mode {image.mode} has more than 8 bits a channel")
            image.draft("RGB", (2 * size, 2 * size))  # reads a large JPEG smaller
            return image.convert("RGB")
    except Exception as error:  # PIL raises all kinds of errors
        raise OSError(f"{file}: {error}") from error


def shapes(n, seed, size=32):
    """Drawn images, uint8 (n, 3, size, size), of flowers with 1 to 8 petals, and labels (n,)."""
    draw = generator("cpu", seed)
    labels = torch.arange(n) % 8
    axis = (torch.arange(2 * size) + 0.5) / size - 1  # at twice the resolution
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    def uniform(low, high, channels=1):
        return low + (high - low) * torch.rand(n, channels, 1, 1, generator=draw)

    def texture(low, high):
        angle = uniform(0, math.pi)
        waves = (uniform(2, 15) * (angle.cos() * x + angle.sin() * y)).sin()
        return uniform(low, high, 3) + uniform(-0.2, 0.2, 3) * waves

    # the flower is repeated twice in each direction, so that most crops show it
    u = (x + uniform(0, 1)) % 1 - 0.5
    v = (y + uniform(0, 1)) % 1 - 0.5
    petals = 1 + labels.view(n, 1, 1, 1)
    edge = uniform(0.25, 0.35) * (1 + 0.5 * (petals * torch.atan2(v, u) + uniform(0, 7)).sin())
    images = torch.where(u.hypot(v) < edge, texture(0.5, 1), texture(0, 0.5))
    images = torch.where(uniform(0, 1) < 0.5, images, 1 - images)
    return (F.avg_pool2d(images.clamp(0, 1), 2) * 255).round().byte(), labels


def load(args, device):
    """Training set, test set, and the names of the classes."""
    root = Path(args.data_dir)
    if args.dataset == "shapes":
        return Held(*shapes(5000, 0), device), Held(*shapes(2000, 1), device), range(1, 9)
    if args.dataset.startswith("cifar"):
        kind = getattr(torchvision.datasets, args.dataset.upper())
        try:
            found = [kind(root, train, download=True) for train in (True, False)]
        except Exception as error:
            missing = f"{args.dataset} is not in {root}, and its download failed ({error})"
            sys.exit(f"{missing}: put its archive there, name another --data-dir, or try shapes")
        images = [torch.tensor(each.data).permute(0, 3, 1, 2) for each in found]
        sets = [Held(x, torch.tensor(each.targets), device) for x, each in zip(images, found)]
        return *sets, found[0].classes
    test = "val" if (root / "val").is_dir() else "test"
    try:
        sets = [
            Folder(root / part, args.image_size, args.views["crop"]) for part in ("train", test)
        ]
    except FileNotFoundError as error:  # no folder, no class, or a class without images
        reason = str(error).splitlines()[0]
        sys.exit(f"{reason}; --data-dir DIR has DIR/train/CLASS/IMAGE, and the same in val or test")
    classes = sets[0].classes
    for name in set(classes) ^ set(sets[1].classes):
        sys.exit(f"{root}: class {name} is not in both train and {test}")
    if sum(map(len, sets)) * 3 * args.image_size**2 > RESIDENT_BYTES:
        return *sets, classes
    for i, folder in enumerate(sets):
        batches = fetch(folder, shares(len(folder), 0, 1), args, device)
        batches = tqdm(batches, "reading images", leave=False, disable=None)
        images = torch.cat([crops[0] for crops, _ in batches])
        sets[i] = Held(images, folder.labels, device)
    return *sets, classes


def shares(n, rank, world):
    """Keys of a process's share of n images, as they are."""
    return [(part, None) for part in torch.arange(n)[rank::world].split(500) if len(part)]


def fetch(data, keys, args, device):
    """Yields a set's images and labels, on the device, for each key."""
    options = dict(batch_size=None, sampler=keys)
    if isinstance(data, Folder):
        options.update(num_workers=args.workers, pin_memory=device.type == "cuda")
    for batch in DataLoader(data, **options):
        yield [tensor.to(device, non_blocking=True) for tensor in batch]


def training_batches(data, args, device, first, steps):
    """Yields views (2B, 3, S, S), a's before b's, and labels (B,) of this process, from step first.

    They depend on the seed and the step, not on the number of processes or on what came before.
    """
    size = args.batch_size
    n = len(data.labels)
    operations = torch.compile(transform, dynamic=False) if args.compile else transform
    recipe = dict(args.views, crop=1) if isinstance(data, Folder) else args.views  # cropped before

    def keys():
        for step in range(first, steps):
            epoch, i = divmod(step, n // size)
            if i == 0 or step == first:
                order = torch.randperm(n, generator=generator("cpu", args.seed, epoch))
            yield order[i * size : (i + 1) * size].chunk(WORLD)[RANK], hash((args.seed, step))

    for step, (images, labels) in enumerate(fetch(data, keys(), args, device), first):
        small = step < args.grow * steps
        pixels = max(8, args.image_size * 5 // 8) if small else args.image_size
        draw = generator(device, args.seed, step, 0)
        draws = torch.rand(2, WORLD, len(labels), 14, generator=draw, device=device)[:, RANK]
        images = images.expand(2, -1, -1, -1, -1).flatten(0, 1)
        yield augment(images, draws.flatten(0, 1), recipe, pixels, operations), labels


def plain_batches(data, args, device):
    """Yields images (B, 3, S, S) as they are, normalized, and labels (B,): this process's share."""
    for images, labels in fetch(data, shares(len(data.labels), RANK, WORLD), args, device):
        images = images[0].float() / 255
        if images.shape[-2:] != (args.image_size, args.image_size):
            images = F.interpolate(images, [args.image_size] * 2, mode="bilinear", antialias=True)
        yield normalize(images, MEAN, STD).to(memory_format=memory_format(device)), labels


# ---- Views ---------------------------------------------------------------------------------------


def augment(images, draws, recipe, size, operations):
    """Random views (B, 3, size, size), normalized, of uint8 images (B, 3, H, W).

    draws (B, 14) are random numbers in [0, 1), recipe is a dict such as VIEWS.
    """
    n, _, height, width = images.shape
    values = parameters(draws, recipe, height, width)
    layout = dict(device=images.device, memory_format=memory_format(images.device))
    views = torch.empty(n, 3, size, size, **layout)
    chunk = 64 if images.is_cpu else n  # fits in a CPU core's cache
    for part in (slice(i, i + chunk) for i in range(0, n, chunk)):
        views[part] = operations(images[part], values[:, part], size, recipe["blur"] > 0)
    return views


def parameters(draws, recipe, height, width):
    """What each view's operations need, (11, B, 1, 1)."""
    draws = draws.T[..., None, None]
    area, aspect, top, left, flip, jitter, *strengths, hue, grey, blur, sigma, solarize = draws
    # area and aspect ratio as in torchvision's RandomResizedCrop, which draws again if a side is
    # longer than the image's; here it is cut
    area = (recipe["crop"] + (1 - recipe["crop"]) * area) * height * width
    aspect = ((2 * aspect - 1) * math.log(4 / 3) * (recipe["crop"] < 1)).exp()
    h = (area / aspect).sqrt().round().clamp(1, height)
    w = (area * aspect).sqrt().round().clamp(1, width)
    top = (top * (height - h + 1)).floor()
    left = (left * (width - w + 1)).floor()
    flip = (flip < recipe["flip"]).float()
    left, w = left + flip * w, w - 2 * flip * w  # a flipped view goes backwards from its right edge
    jitter = (jitter < recipe["jitter"]).float()
    names = "brightness", "contrast", "saturation"
    strengths = [1 + jitter * recipe[name] * (2 * s - 1) for name, s in zip(names, strengths)]
    hue = jitter * recipe["hue"] * (2 * hue - 1)
    grey = (grey < recipe["grey"]).float()
    sigma = (blur < recipe["blur"]) * (0.1 + 1.9 * sigma)
    solarize = (solarize < recipe["solarize"]).float()
    return torch.stack([top, h, left, w, *strengths, hue, grey, sigma, solarize])


def transform(images, values, size, blur):
    """Views (B, 3, size, size) of uint8 images (B, 3, H, W), by torchvision's operations."""
    top, h, left, w, brightness, contrast, saturation, hue, grey, sigma, solarize = values
    _, _, height, width = images.shape
    rows = resampling(top, h, height, size) * (brightness / 255)  # cheaper than on the pixels
    columns = resampling(left, w, width, size)
    x = torch.stack([rows @ plane @ columns.mT for plane in images.float().unbind(1)])
    x = x.clamp(0, 1)  # (3, B, size, size)
    x = torch.lerp(luma(x.mean((2, 3), keepdim=True)), x, contrast).clamp(0, 1)
    x = torch.lerp(luma(x), x, saturation).clamp(0, 1)
    x = turn_hue(x, hue)
    x = torch.lerp(x, luma(x), grey)
    if blur:
        kernel = blurring(sigma, size)
        x = kernel @ x @ kernel.mT
    x = torch.minimum(x, 2 - solarize - x)  # if solarized, 1 - x where x > 1/2
    mean, std = x.new_tensor((MEAN, STD))[..., None, None, None]
    return ((x - mean) / std).transpose(0, 1)


def resampling(start, length, pixels, size):
    """Antialiased resize of pixels [start, start + length) to size, as weights (B, size, pixels).

    A negative length goes backwards, which mirrors the image.
    """
    # weight of pixel j in output o ~ max(0, s - |j + 1/2 - c_o|) if j is inside,
    # c_o = start + (o + 1/2) r,  r = length / size,  s = max(1, |r|)
    r = length / size
    c = start + (torch.arange(size, device=start.device)[:, None] + 0.5) * r
    j = torch.arange(pixels, device=start.device) + 0.5
    inside = (length.abs() / 2 + 0.5 - (j - start - length / 2).abs()).clamp(0, 1)
    weights = (r.abs().clamp(min=1) - (j - c).abs()).clamp(min=0) * inside
    return weights / weights.sum(-1, keepdim=True)


def luma(x):
    """The grey (B, S, S) of colors (3, B, S, S)."""
    red, green, blue = x
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def turn_hue(x, turn):
    """Colors (3, B, S, S) with their hues turned by turn (B, 1, 1) of a circle, as in HSV."""
    red, green, blue = x
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - torch.minimum(torch.minimum(red, green), blue)
    # hue in sixths of a circle, times chroma: green - blue where red is highest, and so on;
    # sign() is 0 where the color is the highest, else 1
    sixths = torch.lerp(2 * chroma + blue - red, 4 * chroma + red - green, (high - green).sign())
    sixths = torch.lerp(green - blue, sixths, (high - red).sign())
    hue = 6 * (sixths / (6 * chroma).clamp(min=1e-12) + (turn + 2)).frac()
    # a color is high - chroma up to a sixth from the hue opposite to it, high from two sixths on
    top = high + chroma
    return torch.stack([top - chroma * ((hue - k).abs() - 3).abs().clamp(1, 2) for k in (3, 5, 1)])


def blurring(sigma, size):
    """Gaussian blur of each sample's sigma (B, 1, 1), as weights (B, size, size) of pixels."""
    # weight of pixel j in output i: sum of exp(-t^2 / 2 sigma^2) over t with i + t reflected to j
    radius = max(1, size // 20)
    t = torch.arange(-radius, radius + 1, device=sigma.device)
    i = torch.arange(size, device=sigma.device)[:, None]
    j = size - 1 - (size - 1 - (i + t).abs()).abs()
    weights = (-0.5 * (t / sigma.clamp(min=1e-3)) ** 2).softmax(-1).expand(-1, size, -1)
    return weights.new_zeros(len(sigma), size, size).scatter_add_(2, j.expand_as(weights), weights)


# ---- Model and optimizer -------------------------------------------------------------------------


class Model(nn.Module):
    """Images (B, 3, S, S) -> embeddings (B, D), and logits (B, classes) of the online probe, which
    sends no gradient to the encoder."""

    def __init__(self, arch, image_size, projector, classes):
        super().__init__()
        self.encoder, features = small() if arch == "small" else resnet(arch, image_size)
        layers = [int(width) for width in projector.split("-")]
        mlp = torchvision.ops.MLP
        self.projector = mlp(features, layers, norm_layer=nn.BatchNorm1d, bias=False)
        self.probe = nn.Linear(features, classes)

    def forward(self, images):
        features = self.encoder(images)
        return self.projector(features), self.probe(features.detach())


def small():
    """An encoder for CPUs, and its number of features."""
    width = 3
    layers = []
    for n in (32, 64, 128, 256):
        pool = nn.MaxPool2d(2, ceil_mode=True) if n < 256 else nn.Identity()
        convolution = nn.Conv2d(width, n, 3, padding=1, bias=False)
        layers += [convolution, pool, nn.BatchNorm2d(n), nn.ReLU(True)]
        width = n
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), width


def resnet(arch, image_size):
    """torchvision's ResNet, for small images with a 3x3 stem and no max-pool; its features."""
    encoder = torchvision.models.get_model(arch, weights=None)
    features = encoder.fc.in_features
    encoder.fc = nn.Identity()
    if image_size <= 64:
        encoder.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        encoder.maxpool = nn.Identity()
    return encoder, features


class LARS(torch.optim.SGD):
    """SGD with gradients of norm eta |w| in groups with a decay (arXiv 1708.03888)."""

    @torch.no_grad()
    def step(self, eta=0.02):
        for group in self.param_groups:
            if "decay" in group:
                for w in group["params"]:
                    # g <- (g + decay w) eta |w| / |g + decay w|, unless one of the norms is 0
                    g = w.grad.add_(w, alpha=group["decay"])
                    ratio = eta * w.norm() / g.norm()
                    g.mul_(torch.where((ratio > 0) & ratio.isfinite(), ratio, 1))
        super().step()


def build_optimizers(args, model):
    """The optimizers of the network, without weight decay of biases and norms, and of the probe."""
    params = [*model.encoder.parameters(), *model.projector.parameters()]
    kinds = dict(lars=LARS, sgd=torch.optim.SGD, adamw=partial(torch.optim.AdamW, fused=True))
    options = dict(weight_decay=0.0) if args.optimizer == "adamw" else dict(momentum=0.9)
    # LARS adds the decay itself, under another name, before it rescales the gradients
    decay = {"decay" if args.optimizer == "lars" else "weight_decay": args.weight_decay}
    weights = dict(params=[p for p in params if p.ndim > 1], **decay)
    others = dict(params=[p for p in params if p.ndim <= 1])
    lr = args.lr if args.optimizer == "adamw" else args.lr * args.batch_size / 256
    main = kinds[args.optimizer]([weights, others], lr, **options)
    return main, kinds["adamw"](model.probe.parameters(), 1e-2, weight_decay=0.0)


def schedule(step, steps, warmup):
    """The share of the learning rate at a step: a linear rise, then half a cosine."""
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    return (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2


def distribute(model, device):
    """The model, with gradients and batch norms of all processes' batch."""
    if WORLD == 1:
        return model
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:  # torch's SyncBatchNorm refuses CPUs: gather the batch before, keep the own part after
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.register_forward_pre_hook(gather_batch)
                module.register_forward_hook(take_part)
    net = nn.parallel.DistributedDataParallel(model)
    net.broadcast_buffers = False  # the processes' buffers agree
    return net


def gather_batch(module, inputs):
    return gather(*inputs) if module.training else None


def take_part(module, inputs, output):
    return output.chunk(WORLD)[RANK].clone() if module.training else None


# ---- The run -------------------------------------------------------------------------------------


class Run:
    """A run's folder, where the first process writes checkpoint.pt, encoder.pt and log.jsonl."""

    def __init__(self, args, parts, **facts):
        self.out = Path(args.out)
        self.settings = dict(vars(args), **facts)
        self.parts = parts  # by name, all that has a state

    def resume(self, device):
        """Continues from the checkpoint, if there is one."""
        saved = [load_checkpoint(self.out / "checkpoint.pt") if RANK == 0 else None]
        if WORLD > 1:
            dist.broadcast_object_list(saved, device=device)
        saved = saved[0] or dict(settings=self.settings, step=0, log_bytes=0, states={})
        for name, value in self.settings.items():
            old = saved["settings"].get(name)
            if old != value and name not in MAY_CHANGE:
                sys.exit(f"{self.out} has a run with {name} {old}, not {value}: name another --out")
        if 0 < saved["step"] and saved["settings"]["epochs"] < self.settings["epochs"]:
            say("more --epochs: the learning rate rises again to that of the longer run")
        for name, state in saved["states"].items():
            if state:  # a scaler has none unless the precision was fp16
                self.parts[name].load_state_dict(state)
        self.saved_at, self.saved_step = time.perf_counter(), saved["step"]
        if RANK == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            self.log_file = open(self.out / "log.jsonl", "ab", buffering=0)
            # drops the lines of steps that will be redone
            self.log_file.truncate(min(saved["log_bytes"], self.log_file.tell()))
            self.written = self.time_written()
            if saved["step"] == 0:
                self.save(0)  # so that another run in this folder finds the settings

    def log(self, record):
        """Writes a line of the log. Ends the run if a value is not finite."""
        for name, value in record.items():
            if not math.isfinite(value):
                step = record["step"]
                sys.exit(f"{name} is {value} at step {step}; {self.out} keeps its checkpoint")
        if RANK == 0:
            self.log_file.write((json.dumps(record) + "\n").encode())

    def time_written(self):
        file = self.out / "checkpoint.pt"
        return file.stat().st_mtime_ns if file.exists() else None

    def save(self, step):
        if self.time_written() != self.written:
            sys.exit(f"another run writes to {self.out}, so this one ends: name another --out")
        model = self.parts["model"]
        if not all(weight.isfinite().all() for weight in model.state_dict().values()):
            sys.exit(f"weights are not finite at step {step}; {self.out} keeps its checkpoint")
        states = {name: part.state_dict() for name, part in self.parts.items()}
        saved = dict(
            settings=self.settings, step=step, log_bytes=self.log_file.tell(), states=states
        )
        write_file(self.out / "encoder.pt", model.encoder.state_dict())
        write_file(self.out / "checkpoint.pt", saved)
        self.written = self.time_written()
        self.saved_at, self.saved_step = time.perf_counter(), step


def write_file(file, content):
    """Saves an object to a file, as a whole or not at all."""
    buffer = io.BytesIO()  # torch.save to a path would report a full disk as a RuntimeError
    torch.save(content, buffer)
    part = file.with_suffix(".part")
    part.write_bytes(buffer.getbuffer())
    os.replace(part, file)


def load_checkpoint(file):
    """A checkpoint, a dict, or None if there is none."""
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        return {name: saved[name] for name in ("settings", "step", "log_bytes", "states")}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:
        reason = f"damaged or of another version of train.py ({type(error).__name__})"
        sys.exit(f"{file} is {reason}: move it away or name another folder")


@torch.no_grad()
def probe_accuracy(model, data, args, device):
    """Top-1 of the online probe on a set's images, in %."""
    model.eval()
    right = torch.zeros((), device=device)
    for images, labels in plain_batches(data, args, device):
        with autocast(args, device):
            _, logits = model(images)
        right += (logits.argmax(1) == labels).sum()
    model.train()
    return 100 * WORLD * average(right).item() / len(data.labels)


def autocast(args, device):
    dtype = torch.float16 if args.precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=args.precision != "fp32")


def train(args, run, train_set, test_set, device, steps):
    model, optimizer, probe_optimizer, scaler = run.parts.values()
    criterion = partial(CRITERIA[args.criterion].terms, **args.set)
    net = distribute(model, device)
    if args.compile:
        net = torch.compile(net, dynamic=False)  # once for each of two sizes of views
        criterion = torch.compile(criterion)
    first = run.saved_step
    per_epoch = len(train_set.labels) // args.batch_size
    bar = tqdm(total=steps, initial=first, unit="step", disable=RANK > 0, mininterval=0.5)
    batches = training_batches(train_set, args, device, first, steps)
    rows, began, test = [], time.perf_counter(), ""
    for step, (views, labels) in enumerate(batches, first):
        lr = optimizer.defaults["lr"] * schedule(step, steps, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with autocast(args, device):
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

        top1 = 100 * (logits.argmax(1) == labels).float().mean()
        rows.append(torch.stack([*terms.values(), loss, top1]).detach())
        done = step + 1
        if done % 20 == 0 or done % per_epoch == 0:  # only here does the host wait for the device
            means = average(torch.stack(rows).mean(0)).tolist()
            record = dict(zip([*terms, "loss", "probe_train"], means), step=step, lr=lr)
            record["samples_per_s"] = len(rows) * args.batch_size / (time.perf_counter() - began)
            if done % per_epoch == 0:
                record |= {name: value.item() for name, value in diagnose(za.detach()).items()}
                record["probe_test"] = probe_accuracy(model, test_set, args, device)
                test = f" (test {record['probe_test']:.1f} %)"
            run.log(record)
            bar.update(done - bar.n)
            loss, top1, speed = record["loss"], record["probe_train"], record["samples_per_s"]
            bar.set_postfix_str(f"loss {loss:.4g}, probe {top1:.1f} %{test}, {speed:.0f} samples/s")
            rows, began = [], time.perf_counter()
        overdue = time.perf_counter() - run.saved_at > args.save_every
        if RANK == 0 and (overdue or done == steps):
            run.save(done)
    bar.close()
    say(f"{run.out}: online probe{test}; next: python eval.py {run.out}")


def main(argv=None):
    args = parse_args(argv)
    device = start(args)
    # one process, then one of each other node, then the others: each node downloads once
    own_turn = 0 if RANK == 0 else 1 if LOCAL_RANK == 0 else 2
    for turn in range(3):
        if turn == own_turn:
            train_set, test_set, classes = load(args, device)
        if WORLD > 1:
            dist.barrier()
    n = len(train_set.labels)
    if n < args.batch_size:
        sys.exit(f"--batch-size {args.batch_size}: there are only {n} training images")
    torch.manual_seed(args.seed)
    model = Model(args.arch, args.image_size, args.projector, len(classes))
    model.to(device, memory_format=memory_format(device))
    optimizer, probe_optimizer = build_optimizers(args, model)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    parts = dict(model=model, optimizer=optimizer, probe=probe_optimizer, scaler=scaler)
    run = Run(args, parts, images=n, classes=len(classes))
    steps = args.epochs * (n // args.batch_size)
    run.resume(device)
    if run.saved_step >= steps:
        return say(f"{run.out} is complete; more --epochs resume the run")
    say(
        f"{args.criterion} on {args.dataset}: {n} images of {len(classes)} classes,"
        f" {len(test_set.labels)} test images; {args.image_size} pixels, {args.arch},"
        f" {args.projector}, {args.optimizer}; {WORLD} x {device.type} {args.precision}; {run.out}"
    )
    try:
        train(args, run, train_set, test_set, device, steps)
    except KeyboardInterrupt:
        step = run.saved_step
        sys.exit(f"stopped; the same command goes on from step {step}" if RANK == 0 else 1)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # an image reader's message has a traceback before it
        sys.exit(f"train.py: {str(error).strip().splitlines()[-1]}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped before the first step")
    if WORLD > 1:
        dist.destroy_process_group()
