"""Pretrain an encoder with any criterion of duality.py.

python train.py --dataset shapes                             # no download, a minute on two cores
python train.py                                              # CIFAR-10, ResNet-18, VICReg
python train.py --criterion simclr --set temperature=0.15    # any criterion, any hyperparameter
torchrun --nproc-per-node 8 train.py --dataset imagenet --data-dir imagenet

A run that was killed goes on from its last checkpoint when the same command is given again.
To change the loss, see duality.py; the data, `load`; the augmentation, `augment`; the encoder,
`Model`; the optimizer, `build_optimizers`; the rest of a step, `train`.
"""

import argparse
import copy
import inspect
import json
import math
import os
import re
import signal
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from duality import CRITERIA, diagnose, gather

DATASETS = ["cifar10", "cifar100", "imagenet", "folder", "shapes"]
DEVICES = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
ARCHS = ["small", *torchvision.models.list_models(torchvision.models, include="*resne[tx]*")]
OPTIMIZERS = ["lars", "sgd", "adamw"]
# defaults by --dataset, --arch and --optimizer; a later one wins
SMALL = dict(arch="small", projector="512-512-512", batch_size=128, optimizer="adamw", grow=0.6)
IMAGENET = dict(arch="resnet50", projector="8192-8192-2048", batch_size=1024, zero_init=True)
IMAGENET |= dict(optimizer="lars", lr=0.3, eta=0.001, weight_decay=1e-6, warmup=0.1)
IMAGENET |= dict(recipes=["crop=0.08", "blur=1,0.1", "solarize=0,0.2"])
PRESETS = {
    "imagenet": dict(IMAGENET, image_size=224),
    "folder": dict(image_size=224),
    "shapes": dict(SMALL, epochs=4, batch_size=64, recipes=["crop=0.5"]),
    "small": SMALL,
    "sgd": dict(lr=0.1, weight_decay=1e-4),
    "adamw": dict(lr=2e-3, weight_decay=1e-2),
}
# a crop's least share of the area; strengths, from brightness to hue; probabilities of all else
AUGMENTATION = dict(crop=0.2, flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2)
AUGMENTATION |= dict(hue=0.1, grey=0.2, blur=0.0, solarize=0.0)
CROP_NUMBERS, NUMBERS = 22, 32  # random numbers that a crop takes, and a whole view
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's red, green and blue
HELD_BYTES = 4 * 2**30  # data sets that fit in this are held on the device, others streamed
PART = f".part-{os.urandom(8).hex()}"  # this run's unfinished file; .owner says whose a folder is
MAY_CHANGE = set("epochs data_dir device workers out save_every compile".split())  # on resuming

# torchrun's processes: how many, the number of this one, and the same on its node
WORLD = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
CORES = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of the node, for each
NO_BAR = RANK > 0 or None  # as tqdm's disable; None: not on a terminal


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
    add("--data-dir", type=os.path.abspath, default="data", help="has train/CLASS/IMAGE, or CIFAR")
    add("--image-size", type=number(int, 8, 1024), default=32, help="side of a view in pixels")
    add("--views", **pairs, dest="recipes", help="augmentation, e.g. blur=0.5, or blur=1,0.1")
    add("--workers", type=number(int, 0, 256), default=min(8, CORES), help="readers of images")

    add = parser.add_argument_group("model and optimization").add_argument
    add("--arch", choices=ARCHS, default="resnet18", metavar="NAME", help="small, or a ResNet")
    flag = dict(action=argparse.BooleanOptionalAction, default=False)
    add("--zero-init", **flag, help="residual branches begin at 0, as in ImageNet's recipes")
    add("--projector", type=widths, default="2048-2048-2048", help="widths of its layers")
    add("--epochs", type=number(int, 1, 10**6), default=100, help="passes over the data")
    add("--batch-size", type=number(int, 2, 10**6), default=256, help="of all processes together")
    add("--optimizer", choices=OPTIMIZERS, default="lars", help="of encoder and projector")
    add("--lr", type=nonnegative, default=0.1, help="times batch size / 256, except with adamw")
    add("--eta", type=nonnegative, default=0.02, help="lars: a step is lr eta of a weight's norm")
    add("--weight-decay", type=nonnegative, default=1e-4, help="of weights, not biases or norms")
    add("--warmup", type=share, default=0.05, help="share of steps in which the rate rises")
    add("--grow", type=share, default=0.0, help="share of steps, the first, at 5/8 of the size")

    add = parser.add_argument_group("running").add_argument
    add("--device", choices=DEVICES, default=DEVICES[0], help="to train on")
    add("--precision", choices=["bf16", "fp16", "fp32"], help="of the network; the loss is in fp32")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of everything random")
    add("--out", type=os.path.abspath, help="the run's folder")
    add("--save-every", type=nonnegative, default=120, help="seconds between checkpoints")
    add("--compile", **flag, help="torch.compile (with torchrun, all but the network)")

    for option in ("dataset", "arch", "optimizer"):  # each may change defaults, which -h shows
        chosen, _ = parser.parse_known_args(argv)
        preset = PRESETS.get(getattr(chosen, option), {})
        if preset.get("arch") != parser.get_default("arch"):  # else shapes has it, changed
            parser.set_defaults(**preset)
    out = f"runs/{chosen.dataset}-{chosen.criterion}"
    parser.set_defaults(out=out, precision=fastest_precision(chosen.device))
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


def check(args, parser):
    """Completes --set and --views, and tries the criterion before any data are read."""
    if args.batch_size % WORLD:
        parser.error(f"--batch-size must be a multiple of {WORLD}, the number of processes")
    parameters = inspect.signature(CRITERIA[args.criterion]).parameters.values()
    hyperparameters = {p.name: p.default for p in parameters if p.default is not p.empty}
    n, d = min(1024, args.batch_size), min(1024, args.projector[-1])  # small: a second at most
    try:
        args.set = keywords(args.set, hyperparameters)
        # NAME=A,B becomes NAME=A for view a, NAME=B for view b
        pairs = [[re.sub("=(.*),(.*)", rf"=\{k}", p) for p in args.recipes] for k in (1, 2)]
        args.recipes = [keywords(of_view, AUGMENTATION) for of_view in pairs]
        CRITERIA[args.criterion](*torch.randn(2, n, d), **args.set)
    except (ArithmeticError, ValueError) as error:
        parser.error(str(error))
    if not all(0 <= value <= 1 for recipe in args.recipes for value in recipe.values()):
        parser.error("a value of --views is not between 0 and 1")


def keywords(pairs, defaults):
    """The defaults, updated by texts NAME=VALUE, each in its default's type."""
    values = dict(defaults)
    for name, _, text in (pair.partition("=") for pair in pairs):
        try:
            kind = type(defaults[name])
            values[name] = {"True": True, "False": False}[text] if kind is bool else kind(text)
        except (KeyError, ValueError):
            choices = ", ".join(f"{name}={default!r}" for name, default in defaults.items())
            raise ValueError(f"{name}={text}: choose from {choices}") from None
    return values


# ---- Processes and devices -----------------------------------------------------------------------


def fastest_precision(device):
    if device == "cuda":  # older GPUs emulate bf16, slowly
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def join(device):
    """Selects this process's GPU, and joins torchrun's processes, if there are any."""
    gpu = torch.device("cuda", LOCAL_RANK) if device == "cuda" else None
    if gpu:
        torch.cuda.set_device(gpu)
        torch.backends.cudnn.benchmark = True  # shapes hardly ever change
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32 in convolutions, too
    if WORLD > 1:
        if "MASTER_ADDR" not in os.environ:
            sys.exit("WORLD_SIZE is set: start several processes with torchrun")
        hour = timedelta(hours=1)  # the first process may have to download the data
        dist.init_process_group("nccl" if gpu else "gloo", timeout=hour, device_id=gpu)


def autocast(args):
    dtype = torch.float16 if args.precision == "fp16" else torch.bfloat16
    return torch.autocast(args.device, dtype, enabled=args.precision != "fp32")


def say(message):
    if RANK == 0:
        tqdm.write(message, sys.stderr)  # above the progress bar


def generator(*key):
    """A random generator, seeded by integers (unlike texts, their hash is always the same)."""
    return torch.Generator().manual_seed(hash(key) % 2**63)


# ---- Data ----------------------------------------------------------------------------------------


def read_image(file, size):
    """The image in RGB. Raises OSError, with the file's name, if damaged or of more than 8 bits."""
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"mode {image.mode} has more than 8 bits a channel")
            # decodes a large JPEG at 1/2, 1/4 or 1/8: a crop of 1/16 of it still has size^2 pixels
            image.draft("RGB", (4 * size, 4 * size))
            return image.convert("RGB")
    except Exception as error:  # PIL raises all kinds of errors
        raise OSError(f"{file}: {error}") from error


def shapes(n, seed, size=32, device="cpu"):
    """Drawn images, uint8 (n, 3, size, size), of flowers with 1 to 8 petals, and labels (n,)."""
    uniform = partial(torch.rand, generator=generator(seed))
    labels = torch.arange(n) % 8
    petals = 1 + labels.view(n, 1, 1, 1)
    left, top, radius, phase, inverted = uniform(5, n, 1, 1, 1)
    axis = torch.linspace(-1, 1, size)
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    # the flower appears twice in each direction, so that most crops show it
    u, v = (u + left) % 1 - 0.5, (v + top) % 1 - 0.5
    edge = (0.25 + 0.1 * radius) * (1 + 0.5 * (petals * torch.atan2(v, u) + 7 * phase).sin())
    flower = (size * (edge - u.hypot(v))).sigmoid()
    dark, light = uniform(2, n, 3, 1, 1) / 2
    images = torch.lerp(dark, light + 0.5, flower)
    images = torch.where(inverted < 0.5, images, 1 - images)
    return (images * 255).byte().to(device), labels.to(device)


def load(args):
    """Training and test set, held as central squares, uint8 (3, S, S), or streamed; and classes."""
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
            loader = partial(read_image, size=size)
            sets = [ImageFolder(root / split, loader=loader) for split in ("train", test)]
            for data in sets:  # an array: reference counts make workers copy a list that they read
                width = max(len(file) for file, _ in data.samples)
                data.samples = data.imgs = np.array(data.samples, f"U{width},i8")
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        needed = "its archive (or try shapes)" if cifar else "train/CLASS/IMAGE and val/CLASS/IMAGE"
        sys.exit(f"{args.dataset}: {reason}; --data-dir DIR must have {needed}")
    classes = sets[0].classes
    unmatched = set(classes) ^ set(sets[1].classes)
    if unmatched:
        sys.exit(f"class {min(unmatched)} is not in both {sets[0].root} and {sets[1].root}")
    held = sum(map(len, sets)) * 3 * size**2 <= HELD_BYTES
    side = size if held else size * 8 // 7  # streamed: the central 7/8, as 224 of 256
    for i, data in enumerate(sets):
        data.transform = Compose([Resize(side), CenterCrop(size), PILToTensor()])
        if held:
            batches = read(data, args, args.workers, batch_size=100)
            batches = tqdm(batches, "reading images", leave=False, disable=NO_BAR)
            sets[i] = TensorDataset(*map(torch.cat, zip(*batches)))
    return *sets, classes


def read(data, args, workers=0, **options):
    """Yields the tensors of a DataLoader's batches, on the device."""
    pin = args.device == "cuda" and workers > 0
    for batch in DataLoader(data, num_workers=workers, pin_memory=pin, **options):
        yield [tensor.to(args.device, non_blocking=True) for tensor in batch]


def plain_batches(data, args, rank=0, world=1):
    """Yields a process's share of the images, normalized (B, 3, S, S), and labels (B,)."""
    size = 500 if args.device == "cuda" else 100
    if isinstance(data, TensorDataset):
        starts = range(rank, len(data), world * size)
        batches = (data[start : start + world * size : world] for start in starts)
    else:
        share = range(rank, len(data), world)
        batches = read(data, args, args.workers, batch_size=size, sampler=share)
    for images, labels in batches:
        yield TF.normalize(images / 255, MEAN, STD), labels


def step_data(data, args, step):
    """What a step needs: images, numbers in [0, 1) (2, B, NUMBERS) for their views, and labels.

    Images (2, B, 3, P, P) are uint8: held ones twice, of streamed ones a crop for each view. All
    depend on the seed and the step alone, and each process has its part of the batch.
    """
    size = args.batch_size
    epoch, k = divmod(step, len(data) // size)
    order = torch.randperm(len(data), generator=generator(args.seed, epoch))
    indices = order[k * size : (k + 1) * size].chunk(WORLD)[RANK]
    numbers = torch.rand(2, size, NUMBERS, generator=generator(args.seed, step, 0))
    numbers = numbers.chunk(WORLD, 1)[RANK]
    if isinstance(data, TensorDataset):
        images, labels = data[indices.to(args.device, non_blocking=True)]
        return images.expand(2, *images.shape), numbers, labels
    pairs = zip(indices.tolist(), numbers.unbind(1))
    crops, labels = zip(*(crop_image(*data[i], of_image, args) for i, of_image in pairs))
    return torch.stack(crops, 1), numbers, torch.tensor(labels)


def crop_image(image, label, numbers, args):
    """A PIL image's crops (2, 3, S, S), one for each view, by numbers (2, NUMBERS); the label."""
    least = torch.tensor([[recipe["crop"]] for recipe in args.recipes])
    boxes = crop_boxes(numbers, least, image.height, image.width).tolist()
    pixels, size = TF.pil_to_tensor(image), 2 * [args.image_size]
    return torch.stack([TF.resized_crop(pixels, *box, size) for box in boxes]), label


def training_batches(data, args, first):
    """Yields, from step first, this process's views (2B, 3, S, S), a's before b's, and labels."""
    workers, recipes = 0, args.recipes
    if not isinstance(data, TensorDataset):  # workers crop whole images, so `augment` keeps all
        workers, recipes = args.workers, [recipe | dict(crop=1) for recipe in recipes]
        data = copy.copy(data)
        data.transform = None
    steps = range(first, args.epochs * (len(data) // args.batch_size))
    compiled_augment = torch.compile(augment, dynamic=False, disable=not args.compile)
    # the "data set" is the steps' numbers, and "collating" one makes all that the step needs
    batches = read(steps, args, workers, batch_size=None, collate_fn=partial(step_data, data, args))
    for step, (images, numbers, labels) in zip(steps, batches):
        side = args.image_size
        if step < args.grow * steps.stop:
            side = max(8, side * 5 // 8)
        views = [compiled_augment(*of_view, side) for of_view in zip(images, numbers, recipes)]
        yield torch.cat(views).to(memory_format=torch.channels_last), labels


# ---- Views ---------------------------------------------------------------------------------------


def crop_boxes(numbers, least, height, width):
    """Random boxes as torchvision's RandomResizedCrop draws them: top, left, height, width (B, 4).

    Each is the first of ten candidates (area from least to 1 of the image's, aspect from 3/4 to
    4/3) that fits into the image, or else the largest of such an aspect (torchvision: central).
    """
    top, left, shares, aspects = numbers[:, :CROP_NUMBERS].split([1, 1, 10, 10], 1)
    areas = (least + (1 - least) * shares) * height * width
    aspects = (4 / 3) ** (2 * aspects - 1)
    heights = (areas / aspects).sqrt().round().clamp(min=1)
    widths = (areas * aspects).sqrt().round().clamp(min=1)
    fits = (heights <= height) & (widths <= width)
    first, fits = fits.int().argmax(1, keepdim=True), fits.any(1, keepdim=True)
    h = torch.where(fits, heights.gather(1, first), min(height, round(width * 4 / 3)))
    w = torch.where(fits, widths.gather(1, first), min(width, round(height * 4 / 3)))
    top = (top * (height - h + 1)).floor()
    left = (left * (width - w + 1)).floor()
    return torch.cat([top, left, h, w], 1).int()


def augment(images, numbers, recipe, size):
    """Random views (B, 3, size, size), normalized, of square uint8 images (B, 3, P, P).

    numbers (B, NUMBERS) are uniform in [0, 1), recipe is a dict such as AUGMENTATION. Operations
    are torchvision's, of a whole batch; mostly in place, which is faster. A new one takes its
    numbers at the end: raise NUMBERS. Streamed images come cropped.
    """
    pixels = images.shape[-1]
    box = crop_boxes(numbers, recipe["crop"], pixels, pixels)
    numbers = numbers.T[CROP_NUMBERS:, :, None, None, None]  # (10, B, 1, 1, 1)
    flip, jitter, brightness, contrast, saturation, hue, grey, blurred, sigma, solarized = numbers

    def shift(number, name):
        return (jitter < recipe["jitter"]) * recipe[name] * (2 * number - 1)

    # crop and flip; images as (B, 3 P, P) make the products of columns larger, so faster
    rows, columns = resampling(box, flip < recipe["flip"], pixels, size)
    x = (images.float().flatten(1, 2) @ columns.mT).unflatten(1, (3, pixels))
    x = rows.div_(255)[:, None] @ x  # (B, 3, size, size)
    x.mul_(1 + shift(brightness, "brightness")).clamp_(0, 1)
    contrast = shift(contrast, "contrast")
    mean = TF.rgb_to_grayscale(x.mean((2, 3), keepdim=True))
    x.mul_(1 + contrast).sub_(contrast * mean).clamp_(0, 1)
    x.lerp_(TF.rgb_to_grayscale(x), -shift(saturation, "saturation")).clamp_(0, 1)
    x = turn_hue(x, shift(hue, "hue"))
    x.lerp_(TF.rgb_to_grayscale(x), (grey < recipe["grey"]).float())
    if recipe["blur"] > 0:
        x = blur(x, (blurred < recipe["blur"]) * (0.1 + 1.9 * sigma))
    if recipe["solarize"] > 0:
        x = torch.where((solarized < recipe["solarize"]) & (x > 0.5), 1 - x, x)
    for channel, mean, std in zip(x.unbind(1), MEAN, STD):
        channel.sub_(mean).div_(std)  # unlike normalize, this copies nothing to the device
    return x


def resampling(box, flip, pixels, size):
    """The rows' and the columns' weights (B, size, pixels) of an antialiased resize of each box.

    Products with them crop, resize and flip a batch at once; torchvision has no such function.
    """
    # the weight of the pixel at x, seen from the box's start, in the output at y is
    # max(0, max(1, scale) - |x - scale y|) over their sum,  scale = length / size
    starts, lengths = box.T[..., None, None].split(2)  # (2, B, 1, 1)
    scale = lengths / size
    x = torch.arange(pixels, device=box.device) + 0.5 - starts
    x = torch.where((x > 0) & (x < lengths), x, math.inf)  # others have no weight
    y = torch.arange(size, device=box.device)[:, None] + 0.5
    # a flipped view goes backwards from its right edge
    y = torch.stack([y.expand(len(box), -1, 1), torch.where(flip[..., 0], size - y, y)])
    weights = (x - scale * y).abs_().sub_(scale.clamp(min=1)).clamp_(max=0)  # negative, as its sum
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

    def __init__(self, args):
        super().__init__()
        self.encoder, features = small() if args.arch == "small" else resnet(args)
        self.projector = torchvision.ops.MLP(features, args.projector, nn.BatchNorm1d, bias=False)
        standardize = nn.BatchNorm1d(features, affine=False)
        self.probe = nn.Sequential(standardize, nn.Linear(features, args.classes))

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


def resnet(args):
    """torchvision's ResNet, up to 64 pixels with a 3x3 stem and no max-pool; its features."""
    encoder = torchvision.models.get_model(args.arch, zero_init_residual=args.zero_init)
    features = encoder.fc.in_features
    encoder.fc = nn.Identity()
    if args.image_size <= 64:
        encoder.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        encoder.maxpool = nn.Identity()
    return encoder, features


class LARS(torch.optim.SGD):
    """SGD; in groups with an eta, gradient plus decay gets norm eta |w| (arXiv 1708.03888)."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for w in group["params"]:
                if group["eta"] and w.grad is not None:
                    # g <- (g + decay w) eta |w| / |g + decay w|, unless one of the norms is 0
                    decay = group["weight_decay"] * w
                    g = w.grad + decay
                    ratio = group["eta"] * w.norm() / g.norm()
                    g = g * torch.where((ratio > 0) & ratio.isfinite(), ratio, 1)
                    w.grad = g - decay  # SGD adds the decay
        return super().step(closure)


def build_optimizers(args, model):
    """The optimizers of the network and of the probe; biases and norms have no decay, no eta."""
    net = [*model.encoder.parameters(), *model.projector.parameters()]
    groups = [
        dict(params=[w for w in net if w.ndim > 1], weight_decay=args.weight_decay, eta=args.eta),
        dict(params=[w for w in net if w.ndim <= 1], weight_decay=0, eta=0),
    ]
    probe = torch.optim.AdamW(model.probe.parameters(), 1e-2, weight_decay=0)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, args.lr), probe
    kind = LARS if args.optimizer == "lars" else torch.optim.SGD
    return kind(groups, args.lr * args.batch_size / 256, momentum=0.9), probe


def schedule(step, steps, warmup):
    """The share of the learning rate at a step: a linear rise, then half a cosine."""
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    return (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2


def distribute(model, args):
    """The model of one of several processes, with gradients and batch norms of the whole batch."""
    if args.device == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:  # torch's SyncBatchNorm refuses CPUs: gather the batch before, keep one's own part after
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


def resume(args, states):
    """Loads the checkpoint, if any, into states (objects by name). Returns its step and log."""
    saved = [load_checkpoint(args.out) if RANK == 0 else None]
    if WORLD > 1:
        dist.broadcast_object_list(saved)
    if not saved[0]:
        return 0, []
    settings, step, log, state_dicts = saved[0].values()
    for name, old in settings.items():
        new = getattr(args, name, old)  # a checkpoint may have an option that is gone
        if new != old and name not in MAY_CHANGE:
            sys.exit(f"{args.out} has a run with {name} {old}, not {new}: name another --out")
    for name, state_dict in state_dicts.items():
        states[name].load_state_dict(state_dict)
    return step, log


def load_checkpoint(folder):
    """A checkpoint, a dict, or None if there is none."""
    file = Path(folder) / "checkpoint.pt"
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        return {name: saved[name] for name in ("settings", "step", "log", "state_dicts")}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:
        reason = f"damaged or of another version of train.py ({type(error).__name__})"
        sys.exit(f"{file} is {reason}: move it away or name another folder")


def begin(folder):
    """Makes the folder this run's. An older run that still writes there sees that, and ends."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in folder.glob(".part-*"):  # of killed runs
        part.unlink(missing_ok=True)
    (folder / ".owner").write_text(PART)


def save(args, states, step, log):
    """Writes log.jsonl, encoder.pt and checkpoint.pt, unless weights are not finite."""
    folder = Path(args.out)
    state_dicts = {name: state.state_dict() for name, state in states.items()}
    if not all(weight.isfinite().all() for weight in state_dicts["model"].values()):
        sys.exit(f"weights are not finite at step {step}; {folder} keeps its checkpoint")
    encoder = {name: w.contiguous() for name, w in states["model"].encoder.state_dict().items()}
    lines = "".join(json.dumps(line) + "\n" for line in log)
    saved = dict(settings=vars(args), step=step, log=log, state_dicts=state_dicts)
    replace(folder / "log.jsonl", lambda file: file.write(lines.encode()))
    replace(folder / "encoder.pt", partial(torch.save, encoder))
    replace(folder / "checkpoint.pt", partial(torch.save, saved))


def replace(path, write):
    """Replaces a file as a whole or not at all, unless another run has begun in its folder."""
    part, owner = path.with_name(PART), path.with_name(".owner")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file:
            write(file)
    except RuntimeError as error:  # so torch.save reports a full disk
        raise error.__context__ or error from None
    if owner.exists() and owner.read_text() != PART:
        part.unlink(missing_ok=True)
        sys.exit(f"another run has begun in {path.parent}, so this one ends")
    os.replace(part, path)


@torch.no_grad()
def probe_accuracy(model, data, args):
    """Top-1 of the online probe on a set's images, in %."""
    model.eval()
    right = torch.zeros((), device=args.device)
    with autocast(args):
        for images, labels in plain_batches(data, args, RANK, WORLD):
            right += (model(images)[1].argmax(1) == labels).sum()
    model.train()
    return 100 * gather(right[None]).sum().item() / len(data)


def means(values):
    """0-d tensors by name as numbers, averaged over all processes. This waits for a GPU."""
    stacked = torch.stack([value.detach() for value in values.values()])
    return dict(zip(values, gather(stacked[None]).mean(0).tolist()))


def train(args, states, first, log, train_set, test_set):
    """The loop: rate, forward, gather, terms, backward, step; then log and save."""
    model, optimizer, probe_optimizer, scaler = states.values()
    compiled = partial(torch.compile, disable=not args.compile)
    criterion = compiled(partial(CRITERIA[args.criterion].terms, **args.set))
    # torch does not compile SyncBatchNorm
    net = distribute(model, args) if WORLD > 1 else compiled(model, dynamic=False)
    per_epoch = len(train_set) // args.batch_size
    steps = args.epochs * per_epoch
    batches = training_batches(train_set, args, first)
    bar = tqdm(batches, total=steps, initial=first, unit="step", disable=NO_BAR)
    logged, logged_at = first, time.perf_counter()
    saved_at = logged_at
    for step, (views, labels) in enumerate(bar, first):
        lr = optimizer.defaults["lr"] * schedule(step, steps, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with autocast(args):
            # both views at once: batch norms see both, as in SimCLR (VICReg's code: each alone)
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

        done = step + 1
        if done % 20 == 0 or done % per_epoch == 0:  # seldom: to read metrics is to wait for a GPU
            right = (logits.argmax(1) == labels).float().mean()
            line = dict(means(dict(terms, loss=loss, probe_train=100 * right)), step=done, lr=lr)
            speed = (done - logged) * args.batch_size / (time.perf_counter() - logged_at)
            line["samples_per_s"] = speed
            if not math.isfinite(line["loss"]):
                sys.exit(f"not finite: {line}; {args.out} keeps its checkpoint")
            text = f"loss {loss:.4g}, {speed:.0f} samples/s, probe {line['probe_train']:.1f} %"
            bar.set_postfix_str(text)
            if done % per_epoch == 0:
                line |= means(diagnose(za))
                line["probe_test"] = probe_accuracy(model, test_set, args)
                say(f"epoch {done // per_epoch}: {text}, test {line['probe_test']:.1f} %")
            log.append(line)
            logged, logged_at = done, time.perf_counter()
        if RANK == 0 and (done == steps or time.perf_counter() - saved_at > args.save_every):
            save(args, states, done, log)
            saved_at = time.perf_counter()


def main(args):
    join(args.device)
    for turn in range(3):  # one process, then one of each other node, then all others
        if turn == (RANK > 0) + (LOCAL_RANK > 0):
            train_set, test_set, classes = load(args)
        if WORLD > 1:
            dist.barrier()
    args.images, args.classes = len(train_set), len(classes)
    if args.images < args.batch_size:
        sys.exit(f"--batch-size {args.batch_size}: there are only {args.images} training images")

    torch.manual_seed(args.seed)
    model = Model(args).to(args.device, memory_format=torch.channels_last)
    optimizer, probe_optimizer = build_optimizers(args, model)
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")

    states = dict(model=model, optimizer=optimizer, probe_optimizer=probe_optimizer, scaler=scaler)
    first, log = resume(args, states)
    if first >= args.epochs * (args.images // args.batch_size):
        return say(f"{args.out} is complete; more --epochs resume it, at the longer run's rate")
    if RANK == 0:
        begin(Path(args.out))
    images = f"{args.images} images of {args.classes} classes, {len(test_set)} for testing"
    say(f"{args.out}: {args.arch}, {images}; {WORLD} x {args.device} {args.precision}")
    train(args, states, first, log, train_set, test_set)
    say(f"next: python eval.py {args.out}")


def stop(*_):
    """Ends the process at Ctrl-C: as an exception it could be lost, in a destructor."""
    if not torch.utils.data.get_worker_info():  # forked workers have this handler, too
        say("stopped; the same command goes on from the last checkpoint")
    os._exit(1)


if __name__ == "__main__":
    args = parse_args()
    signal.signal(signal.SIGINT, stop)
    try:
        main(args)
    except OSError as error:  # an image reader's message has a traceback before it
        sys.exit(f"train.py: {(str(error).strip() or repr(error)).splitlines()[-1]}")
    if WORLD > 1:
        dist.destroy_process_group()
