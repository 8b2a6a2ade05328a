"""Pretrain an encoder with any criterion of duality.py. The same command again resumes the run.

python train.py --dataset shapes                             # no download, a minute on two cores
python train.py                                              # CIFAR-10, ResNet-18, VICReg
python train.py --criterion simclr --set temperature=0.15    # any criterion, any hyperparameter
torchrun --nproc-per-node 8 train.py --dataset imagenet --data-dir imagenet --batch-size 1024
"""

import argparse
import atexit
import ctypes
import datetime
import inspect
import io
import json
import math
import os
import re
import signal
import sys
import time
import traceback
import warnings
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import distributed as dist
from torch import nn
from torch.profiler import record_function
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from duality import CRITERIA, diagnose, gather

# Defaults by dataset, by size of the network, and by optimiser.
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
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's red, green and blue
RESIDENT_BYTES = 4 * 2**30  # images that fit in this are held on the device, others are streamed
LIMITS = dict(image_size=(8, 1024), workers=(0, 256), epochs=(1, 1e6), batch_size=(2, 1e6))
LIMITS |= dict(lr=(1e-9, 1e9), weight_decay=(0, 1e9), warmup=(0, 1), grow=(0, 1))
LIMITS |= dict(save_every=(0, 1e9), seed=(0, 1e9))
MAY_CHANGE = "epochs data_dir workers device precision out save_every compile profile".split()


def environment(name, default):
    """A number that torchrun sets."""
    return int(os.environ.get(name, default))


def say(message):
    if environment("RANK", 0) == 0:
        tqdm.write(message, sys.stderr)  # above the progress bar


def fail(message, status=2):
    """Ends this process with one line. Until they are connected, one process a node prints it."""
    if dist.is_initialized() or environment("LOCAL_RANK", 0) == 0:
        rank = f"rank {environment('RANK', 0)}: " if environment("WORLD_SIZE", 1) > 1 else ""
        tqdm.write(f"{Path(sys.argv[0]).name}: {rank}{message}", sys.stderr)
    leave(status)


def leave(status):
    if dist.is_initialized():
        os._exit(status)  # an ordinary exit could wait for the other processes
    raise SystemExit(status)


# ---- Settings ------------------------------------------------------------------------------------


def parse_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    usage = "%(prog)s [options]"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__, formatter_class=raw)
    parser.error = lambda message: fail(f"{message} (-h lists the options)")
    pairs = dict(nargs="+", action="extend", default=[], metavar="NAME=VALUE")

    add = parser.add_argument_group("criterion").add_argument
    add("--criterion", choices=CRITERIA, default="vicreg", help="default: vicreg")
    add("--set", **pairs, help="hyperparameters, e.g. temperature=0.15; a wrong name lists all")

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="cifar10", help="default: cifar10")
    add("--data-dir", metavar="DIR", help="holds train/CLASS/IMAGE, or CIFAR; default: data")
    add("--image-size", type=int, metavar="PIXELS", help="default: 32, imagenet and folder 224")
    add("--views", **pairs, help="augmentation, e.g. grey=0.1; a wrong name lists all")
    add("--workers", type=int, metavar="N", help="image readers; default: one per core, up to 8")

    add = parser.add_argument_group("model").add_argument
    add("--arch", choices=ARCHS, help="default: resnet18, imagenet resnet50, shapes small")
    add("--projector", metavar="N-N-N", help="default: 2048-2048-2048, small 512-512-512")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, metavar="N", help="default: 100, shapes 12")
    add("--batch-size", type=int, metavar="N", help="total over processes; default: 256, small 128")
    add("--optimizer", choices=OPTIMIZERS, help="default: lars, small adamw")
    scaled = "scaled by batch size / 256, except with adamw; default: 0.1, adamw 2e-3"
    add("--lr", type=float, help=scaled)
    add("--weight-decay", type=float, metavar="WD", help="default: 1e-4, adamw 0.01")
    add("--warmup", type=float, default=0.05, metavar="SHARE", help="of steps; default: 0.05")
    grow = "of steps, at the start, with views of 5/8 the size; default: 0, small 0.6"
    add("--grow", type=float, metavar="SHARE", help=grow)

    add = parser.add_argument_group("running").add_argument
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="default: auto")
    precisions = ["auto", "bf16", "fp16", "fp32"]
    add("--precision", choices=precisions, default="auto", help="default: auto, the fastest")
    add("--seed", type=int, default=0, metavar="N", help="default: 0")
    add("--out", metavar="DIR", help="the run's folder; default: runs/DATASET-CRITERION")
    add("--save-every", type=float, default=120, metavar="SECONDS", help="default: 120")
    add("--compile", action="store_true", help="torch.compile network, criterion and views")
    add("--profile", action="store_true", help="show where a step's time goes; saves nothing")
    args = parser.parse_args(argv)
    complete(args)
    return args


def complete(args):
    """Adds the defaults that depend on other settings, and refuses what cannot work."""
    defaults = dict(data_dir="data", workers=cores(), out=f"runs/{args.dataset}-{args.criterion}")
    defaults |= DATASETS[args.dataset]
    defaults |= SMALL if (args.arch or defaults["arch"]) == "small" else RESNET
    defaults |= OPTIMIZERS[args.optimizer or defaults["optimizer"]]
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, (least, most) in LIMITS.items():
        value = getattr(args, name)
        if not least <= value <= most:
            fail(f"--{name.replace('_', '-')} {value}: not between {least:g} and {most:g}")
    if not re.fullmatch(r"[1-9]\d{0,4}(-[1-9]\d{0,4})*", args.projector):
        fail(f"--projector {args.projector}: not a list of layer widths such as 2048-2048-512")
    args.set = keywords("--set", args.set, CRITERIA[args.criterion])
    args.views = keywords("--views", args.views, Views)
    try:  # now, not after the data are read
        Views(8, **args.views)
        embeddings = torch.randn(2, 4, int(args.projector.split("-")[-1]))
        CRITERIA[args.criterion](*embeddings, **args.set)
    except (ArithmeticError, ValueError) as error:
        fail(f"--set, --views or --projector: {error}")


def cores():
    """The number of cores that this process may use, at most eight."""
    linux = hasattr(os, "sched_getaffinity")
    n = len(os.sched_getaffinity(0)) if linux else os.cpu_count()
    return min(8, max(1, n // environment("LOCAL_WORLD_SIZE", 1)))


def keywords(flag, pairs, function):
    """NAME=VALUE texts as keyword arguments of the function; its defaults tell their types."""
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    found = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            found[name] = text if isinstance(defaults[name], str) else float(text)
            if not isinstance(found[name], str) and not math.isfinite(found[name]):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            choices = ", ".join(f"{name}={default}" for name, default in defaults.items())
            fail(f"{flag} {pair}: choose from {choices}")
    return found


# ---- Processes and devices -----------------------------------------------------------------------


@dataclass
class Process:
    """This process: its device, and its rank among the processes that torchrun has started."""

    device: torch.device
    precision: str = "fp32"
    rank: int = 0
    world: int = 1
    control: object = None  # a group that waits patiently, but notices if a process has died

    def largest(self, number=0):
        """The largest number of all processes. Ends this one if another has failed."""
        number = torch.tensor(number)
        if self.world > 1:
            try:
                dist.all_reduce(number, dist.ReduceOp.MAX, group=self.control)
            except RuntimeError:
                fail("another process has ended", 1)
        return number.item()

    def wait(self):
        """Waits for all processes. Ends this one if another has failed."""
        self.largest()

    def share(self, value):
        """The first process's value, in all of them."""
        values = [value]
        self.wait()
        if self.world > 1:
            dist.broadcast_object_list(values, group=self.control)
        return values[0]

    def sum(self, tensor):
        """The sum of all processes' tensors, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def autocast(self):
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "fp32")


def start(args):
    """Joins torchrun's processes, if there are any. Returns this one."""
    world = environment("WORLD_SIZE", 1)
    if args.batch_size % world or args.batch_size < 2 * world:
        fail(f"--batch-size {args.batch_size} does not divide into {world} parts of at least 2")
    device = choose_device(args.device, world)
    precision = fastest_precision(device) if args.precision == "auto" else args.precision
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # shapes hardly ever change
        if precision != "fp32":  # then TF32 is more precise than the features are
            torch.set_float32_matmul_precision("high")
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        # make glibc keep freed memory: asking the system for it again costs a fifth of a step
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
    if world == 1:
        return Process(device, precision)
    # one group for tensors on their device, and one that waits for as long as a download takes
    try:
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    except ValueError as error:  # WORLD_SIZE is set, but other variables are not
        fail(f"start several processes with torchrun ({error})")
    control = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
    return Process(device, precision, dist.get_rank(), world, control)


def choose_device(wanted, world):
    available = ["cpu"]
    if torch.backends.mps.is_available() and world == 1:  # no backend sends its tensors
        available.insert(0, "mps")
    if torch.cuda.is_available() and (world == 1 or dist.is_nccl_available()):
        available.insert(0, "cuda")
    kind = available[0] if wanted == "auto" else wanted
    if kind not in available:
        fail(f"--device {kind}: for {world} process(es) there is only {', '.join(available)}")
    if kind != "cuda":
        return torch.device(kind)
    if environment("LOCAL_WORLD_SIZE", 1) > torch.cuda.device_count():
        fail(f"--nproc-per-node is more than this node's {torch.cuda.device_count()} GPU(s)")
    return torch.device(kind, environment("LOCAL_RANK", 0))


def fastest_precision(device):
    if device.type == "cuda":  # older GPUs emulate bf16, slowly
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    fast_on_cpu = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if device.type == "cpu" and fast_on_cpu() else "fp32"


def memory_format(device):
    # in channels_last, MPS computes a wrong gradient of batch norm (pytorch issue 175189)
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def generator(device, *key):
    """A random generator that depends on nothing but its key."""
    return torch.Generator(device).manual_seed(zlib.crc32(repr(key).encode()))


# ---- Data ----------------------------------------------------------------------------------------


def larger(u, v):
    return torch.maximum(u.abs(), v.abs())


SHAPES = dict(  # which points (u, v) each of them covers
    disc=lambda u, v: u.hypot(v) < 0.9,
    ring=lambda u, v: (u.hypot(v) - 0.8).abs() < 0.2,
    square=lambda u, v: larger(u, v) < 0.8,
    frame=lambda u, v: (larger(u, v) - 0.7).abs() < 0.2,
    triangle=lambda u, v: (v < 0.7) & (v > 2 * u.abs() - 0.9),
    cross=lambda u, v: (torch.minimum(u.abs(), v.abs()) < 0.25) & (larger(u, v) < 1),
    bars=lambda u, v: (v.abs() > 0.3) & (larger(u, v) < 0.9),
    posts=lambda u, v: (u.abs() > 0.3) & (larger(u, v) < 0.9),
)


def shapes(n, seed, size=32):
    """uint8 images (n, 3, size, size), labels (n,): four copies of a shape, the rest random."""
    draw = generator("cpu", seed, 0, 9)
    labels = torch.arange(n) % 8
    axis = (torch.arange(2 * size) + 0.5) / size * 2 - 2  # at twice the resolution
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, 1, 1, generator=draw)

    def texture(low, high):
        angle = uniform(0, math.pi)
        frequency = uniform(2, 15)
        amplitude = uniform(-0.2, 0.2, 3)
        waves = (frequency * (angle.cos() * x + angle.sin() * y)).sin()
        return uniform(low, high, 3) + amplitude * waves[:, None]

    images = texture(0, 0.5)
    for row, column in ((-1, -1), (-1, 1), (1, -1), (1, 1)):  # the quarters of the image
        scale = uniform(0.4, 0.95)
        tilt = uniform(-0.5, 0.5)
        right = (x - column - uniform(-0.4, 0.4)) / scale
        down = (y - row - uniform(-0.4, 0.4)) / scale
        u = tilt.cos() * right + tilt.sin() * down
        v = tilt.cos() * down - tilt.sin() * right
        inside = torch.empty(u.shape, dtype=torch.bool)
        for label, covers in enumerate(SHAPES.values()):
            inside[label::8] = covers(u[label::8], v[label::8])
        images = torch.where(inside[:, None], texture(0.5, 1), images)
    images = torch.where(uniform(0, 1, 1) < 0.5, images, 1 - images)
    return (F.avg_pool2d(images.clamp(0, 1), 2) * 255).round().byte(), labels


class Files(Dataset):
    """Images on disk. By (indices, seed): uint8 crops (k, B, 3, S, S), two random ones or, where
    seed is None, the centre; labels (B,)."""

    def __init__(self, folder, size, least_area):
        try:
            found = torchvision.datasets.ImageFolder(folder)
        except FileNotFoundError as error:  # no folder, no class, or a class without images
            fail(f"{str(error).splitlines()[0]}; --data-dir DIR has DIR/train/CLASS/IMAGE")
        # an array, since each worker would end up with a copy of a list
        self.paths = np.array([os.fsencode(path) for path, _ in found.samples])
        self.labels = torch.tensor(found.targets)
        self.classes = found.classes
        self.size = size
        self.random_crop = RandomResizedCrop(size, (least_area, 1))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        indices, seed = key
        crops = [self.crops(i, seed) for i in indices.tolist()]
        return torch.stack(crops, 1), self.labels[indices]

    def crops(self, i, seed):
        image = read_image(os.fsdecode(self.paths[i]), self.size)
        if seed is None:
            crops = [ImageOps.fit(image, (self.size, self.size), Image.Resampling.BILINEAR)]
        else:
            torch.default_generator.manual_seed((seed * 1_000_003 + i) % 2**63)
            crops = [self.random_crop(image), self.random_crop(image)]
        return torch.stack([pil_to_tensor(crop) for crop in crops])

    def stream(self, keys, workers, pin_memory=False):
        """A DataLoader that keeps its workers from one pass to the next."""
        options = dict(num_workers=workers, persistent_workers=workers > 0, pin_memory=pin_memory)
        if workers and sys.platform == "linux":
            options["multiprocessing_context"] = "fork"  # a fresh process would import torch again
        ignore = partial(on_signals, signal.SIG_IGN)  # the run ends them
        return DataLoader(self, batch_size=None, sampler=keys, worker_init_fn=ignore, **options)

    def read_all(self, workers):
        """Images (N, 3, S, S) and labels (N,) of all files."""
        images = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8)
        keys = [(indices, None) for indices in torch.arange(len(self)).split(500)]
        loader = tqdm(self.stream(keys, workers), "reading images", leave=False, disable=None)
        for part, (crops, _) in zip(images.split(500), loader):
            part.copy_(crops[0])
        return images, self.labels


def read_image(path, size):
    """The image in a file, or a grey one and a warning if its content is damaged."""
    try:
        with Image.open(path) as file:
            file.draft("RGB", (2 * size, 2 * size))  # reads a large JPEG smaller
            if file.mode.startswith("I;16"):  # PIL would clip its 16 bits to the lowest 8
                file = file.convert("I").point(lambda value: value * (1 / 256))
            return file.convert("RGB")
    except Exception as error:  # PIL raises all kinds of errors
        if getattr(error, "errno", None):  # the disk's error, not the image's
            raise
        warnings.warn(f"{path} cannot be read: a grey image replaces it", stacklevel=1)
        return Image.new("RGB", (1, 1), "grey")


def on_signals(handler, worker=None):  # a DataLoader passes its worker's number
    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)


def load(args):
    """Training and test set: uint8 images (N, 3, H, W), or Files if too many, and labels.

    A folder that fits in memory is cut and resized to image_size first, and views are crops of
    that; Files crop the originals.
    """
    root = Path(args.data_dir)
    if args.dataset == "shapes":
        images, labels = zip(*(shapes(500, seed) for seed in range(14)))
        return [(torch.cat(images[i:j]), torch.cat(labels[i:j])) for i, j in ((0, 10), (10, 14))]
    if args.dataset in ("cifar10", "cifar100"):
        kind = getattr(torchvision.datasets, args.dataset.upper())
        try:
            sets = [kind(root, train=flag, download=True) for flag in (True, False)]
        except Exception as error:
            missing = f"{args.dataset} is not in {root}, and its download failed ({error})"
            fail(f"{missing}: put its archive there, name another --data-dir, or try shapes")
        return [(torch.tensor(s.data.transpose(0, 3, 1, 2)), torch.tensor(s.targets)) for s in sets]
    test = "val" if (root / "val").is_dir() else "test"
    least_area = args.views.get("crop", Views.crop)
    sets = [Files(root / split, args.image_size, least_area) for split in ("train", test)]
    if sets[0].classes != sets[1].classes:
        fail(f"{root}: train and {test} have different classes")
    if sum(map(len, sets)) * 3 * args.image_size**2 <= RESIDENT_BYTES:
        return [files.read_all(args.workers) for files in sets]
    return [(files, files.labels) for files in sets]


def load_in_turn(args, process):
    """load(args): in the first process, then in one of each other node, then in the others.

    So each node downloads once, and nodes that share a disk do not both write to it.
    """
    mine = 0 if process.rank == 0 else 1 if environment("LOCAL_RANK", 0) == 0 else 2
    for turn in range(3):
        if turn == mine:
            sets = load(args)
        process.wait()
    return sets


class Data:
    """Training images in batches of two views, and the images of either set as they are.

    Views depend on seed and step, not on the number of processes or on whether a run was resumed.
    """

    def __init__(self, args, process):
        self.args = args
        self.process = process
        self.sets = dict(zip(("train", "test"), load_in_turn(args, process)))
        images, labels = self.sets["train"]
        self.classes = 1 + int(labels.max())
        self.steps_per_epoch = len(labels) // args.batch_size
        self.views = Views(args.image_size, **args.views)
        self.whole = Views(args.image_size, crop=1, flip=0, jitter=0, grey=0)
        self.loaders = {}
        atexit.register(self.loaders.clear)  # ends their processes, which heed no signal
        if isinstance(images, Files):
            self.views.crop = 1  # files are cropped where they are read
        else:
            for split, pair in self.sets.items():
                self.sets[split] = [tensor.to(process.device) for tensor in pair]
        if args.compile:
            self.views.apply = torch.compile(self.views.apply, dynamic=False)

    def batches(self, first, steps):
        """Yields views (2B, 3, S, S), a's before b's, and labels (B,) of steps from first on."""
        args = self.args
        self.loaders.pop("train", None)  # it was made for other steps
        batches = self.fetch("train", self.keys(first, steps))
        for step, (images, labels) in enumerate(batches, first):
            small = step < args.grow * steps
            self.views.image_size = max(8, args.image_size * 5 // 8) if small else args.image_size
            draw = generator(self.process.device, args.seed, step)
            images = images.expand(2, -1, -1, -1, -1)  # Files bring two crops already
            yield self.views(images, draw, self.process.rank, self.process.world), labels

    def keys(self, first, steps):
        """Yields the indices of this process's share of each step's images, and a seed."""
        _, labels = self.sets["train"]
        size = self.args.batch_size
        for step in range(first, steps):
            epoch, i = divmod(step, self.steps_per_epoch)
            if i == 0 or step == first:
                draw = generator("cpu", self.args.seed, epoch, 2)
                order = torch.randperm(len(labels), generator=draw).to(labels.device)
            batch = order.narrow(0, i * size, size)
            share = batch.chunk(self.process.world)[self.process.rank]
            yield share, self.args.seed * 1_000_003 + step

    def plain(self, split, batch=500):
        """Yields (images, labels) of this process's share of a set, resized and normalised."""
        _, labels = self.sets[split]
        shares = torch.arange(len(labels))[self.process.rank :: self.process.world].split(batch)
        for images, labels in self.fetch(split, [(share, None) for share in shares if len(share)]):
            yield self.whole(images), labels

    def fetch(self, split, keys):
        """Yields images (k, B, 3, H, W), k = 1 or 2 crops as Files has them, and labels (B,)."""
        images, labels = self.sets[split]
        if torch.is_tensor(images):
            for indices, _ in keys:
                yield images[indices][None], labels[indices]
            return
        device = self.process.device
        if split not in self.loaders:
            self.loaders[split] = images.stream(keys, self.args.workers, device.type == "cuda")
        for crops, labels in self.loaders[split]:
            yield crops.to(device, non_blocking=True), labels.to(device, non_blocking=True)


# ---- Views ---------------------------------------------------------------------------------------


def luma(rgb):
    """The grey (B, P) of colour planes (3, B, P)."""
    red, green, blue = rgb
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def adjust_hue(rgb, turn):
    """Turns the hue of planes (3, B, P), in place, by turn (B, 1) of a circle, as HSV has it."""
    red, green, blue = rgb
    high = rgb.amax(0)
    chroma = high - rgb.amin(0)
    # hue in sixths of a circle, times chroma: g - b, 2 chroma + b - r or 4 chroma + r - g, where
    # red, green or blue is highest
    green_or_blue = torch.where(high == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    sixths = torch.where(high == red, green - blue, green_or_blue)
    hue = (sixths / chroma.clamp_min(1e-12)).mul_(1 / 6).add_(turn + 2)  # positive
    # a plane is high - chroma clamp(2 - d, 0, 1), d sixths away from where it is low
    for plane, turned in zip(rgb, (5 / 6, 3 / 6, 1 / 6)):
        away = (hue + turned).frac_().mul_(6).sub_(2).abs_()
        torch.addcmul(high, chroma, away.sub_(2).clamp_(-1, 0), out=plane)


def resampling(start, length, size, out):
    """Antialiased resize of [start, start + length), (B, 1), as weights (B, out, size) of pixels.

    A negative length goes backwards, which mirrors the image.
    """
    # weight of pixel j in output o ~ max(0, s - |j + 1/2 - c_o|), s = max(1, |r|),
    # c_o = start + (o + 1/2) r, r = length / out
    start = start[..., None]
    length = length[..., None]
    ratio = length / out
    pixels = torch.arange(size, device=start.device) + 0.5
    centres = start + (torch.arange(out, device=start.device)[:, None] + 0.5) * ratio
    outside = (pixels - (start + length / 2)).abs_() > length.abs() / 2
    distances = (pixels.masked_fill(outside, math.inf) - centres).abs_()
    weights = (ratio.abs().clamp_min_(1) - distances).clamp_min_(0)
    return weights.mul_(1 / weights.sum(-1, keepdim=True))


def blurring(sigma, size):
    """Gaussian blur of each sample's own sigma (B, 1), as weights (B, size, size) of pixels."""
    # weight of pixel j in output i: sum of exp(-t^2 / 2 sigma^2) over t with i + t reflected to j
    radius = max(1, size // 20)
    t = torch.arange(-radius, radius + 1, device=sigma.device)
    i = torch.arange(size, device=sigma.device)[:, None]
    j = size - 1 - (size - 1 - (i + t).abs()).abs()
    weights = (-0.5 * (t / sigma) ** 2).softmax(1)[:, None].expand(-1, size, -1)
    return weights.new_zeros(len(sigma), size, size).scatter_add_(2, j.expand_as(weights), weights)


@dataclass
class Views:
    """Random views of uint8 images, normalised; each sample's parameters are drawn on their own.

    All in [0, 1]: crop is the least share of the area, 1 for the whole image; flip, jitter, grey,
    blur and solarise are probabilities; brightness to hue are strengths, applied in that order.
    """

    image_size: int
    crop: float = 0.2
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grey: float = 0.2
    blur: float = 0.0
    solarise: float = 0.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if name != "image_size" and not 0 <= value <= 1:
                raise ValueError(f"{name} of views must be in [0, 1], not {value}")

    def draw(self, n, height, width, device=None, generator=None):
        """The parameters of n views, a dict of (n, 1) tensors."""

        def uniform(low, high, draws=1):
            return low + (high - low) * torch.rand(n, draws, device=device, generator=generator)

        def chance(probability):
            return (uniform(0, 1) < probability).float()

        # torchvision's RandomResizedCrop: the first of ten sizes that fits, or the whole image
        area = uniform(self.crop, 1, 10) * height * width
        aspect = uniform(math.log(3 / 4), math.log(4 / 3), 10).exp()
        h = F.pad((area / aspect).sqrt().round(), (0, 1), value=height)
        w = F.pad((area * aspect).sqrt().round(), (0, 1), value=width)
        fits = (h <= height) & (w <= width) & (h * w > 0)
        first = fits.byte().argmax(1, keepdim=True)
        h = h.gather(1, first)
        w = w.gather(1, first)
        top = (uniform(0, 1) * (height - h + 1)).floor()
        left = (uniform(0, 1) * (width - w + 1)).floor()
        flip = chance(self.flip)
        jitter = chance(self.jitter)
        # a flipped view goes backwards from its right edge
        p = dict(top=top, height=h, left=left + flip * w, width=(1 - 2 * flip) * w)
        for name in ("brightness", "contrast", "saturation"):
            p[name] = 1 + jitter * getattr(self, name) * uniform(-1, 1)
        p.update(hue=jitter * self.hue * uniform(-1, 1), grey=chance(self.grey))
        p.update(sigma=1e-3 + chance(self.blur) * uniform(0.1, 2))  # 1e-3 leaves the image as it is
        p.update(solarise=chance(self.solarise))
        return p

    def apply(self, images, p):
        """Views (B, 3, S, S) of uint8 images (B, 3, H, W) by parameters p, as in torchvision."""
        n, _, height, width = images.shape
        size = self.image_size
        rows = resampling(p["top"], p["height"], height, size)
        rows *= p["brightness"][..., None] / 255  # cheaper here than on the pixels
        columns = resampling(p["left"], p["width"], width, size)
        images = images.float().reshape(n, 3 * height, width) @ columns.mT
        x = images.new_empty(3, n, size * size)  # colour planes
        planes = images.view(n, 3, height, size).unbind(1)
        for plane, image in zip(x.view(3, n, size, size), planes):
            torch.bmm(rows, image, out=plane)
        if self.jitter:
            mean = luma(x.clamp_(0, 1).mean(2, keepdim=True))
            x = x.mul_(p["contrast"]).add_((1 - p["contrast"]) * mean).clamp_(0, 1)
            x = x.lerp_(luma(x).expand_as(x), 1 - p["saturation"]).clamp_(0, 1)
            adjust_hue(x, p["hue"])
        if self.grey:
            x = x.lerp_(luma(x).expand_as(x), p["grey"])
        if self.blur:
            kernel = blurring(p["sigma"], size)
            x = (kernel @ x.view(3, n, size, size) @ kernel.mT).flatten(2)
        if self.solarise:
            x = torch.minimum(x, 2 - p["solarise"] - x)  # 1 - x where x > 1/2; 2 - x is never less
        for plane, mean, std in zip(x, MEAN, STD):
            plane.sub_(mean).mul_(1 / std)
        return x.view(3, n, size, size).transpose(0, 1)

    @record_function("views")
    def __call__(self, images, generator=None, rank=0, world=1):
        """(k, B, 3, H, W) -> (k B, 3, S, S): k views of B images, part rank of world of a batch.

        The generator draws for the whole batch, so its views do not depend on the number of parts.
        """
        k, b, _, height, width = images.shape
        n = k * b
        size = self.image_size
        p = self.draw(n * world, height, width, images.device, generator)
        # the draws of a batch are ordered by view, process, image
        p = {name: p[name].view(k, world, b)[:, rank].reshape(n, 1) for name in p}
        images = images.flatten(0, 1)
        layout = dict(device=images.device, memory_format=memory_format(images.device))
        views = torch.empty(n, 3, size, size, **layout)
        chunk = 64 if images.is_cpu else n  # a CPU core's cache holds 64
        with torch.autocast(images.device.type, enabled=False):
            for part in (slice(i, i + chunk) for i in range(0, n, chunk)):
                views[part] = self.apply(images[part], {name: p[name][part] for name in p})
        return views


# ---- Model and optimiser -------------------------------------------------------------------------


class Model(nn.Module):
    """Images (B, 3, S, S) -> embeddings (B, D), and logits (B, classes) of the online probe, which
    sends no gradient to the encoder."""

    def __init__(self, arch, image_size, projector, classes):
        super().__init__()
        self.encoder, width = small() if arch == "small" else resnet(arch, image_size)
        self.probe = nn.Linear(width, classes)
        *hidden, last = map(int, projector.split("-"))
        layers = []
        for n in hidden:
            layers += [nn.Linear(width, n, bias=False), nn.BatchNorm1d(n), nn.ReLU(True)]
            width = n
        self.projector = nn.Sequential(*layers, nn.Linear(width, last, bias=False))

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
    """SGD that rescales gradients to norm eta |w| in groups with an eta (arXiv 1708.03888)."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if "eta" in group:
                # g <- g + decay w
                w = [p for p in group["params"] if p.grad is not None]
                g = [p.grad for p in w]
                torch._foreach_add_(g, w, alpha=group["decay"])
                # g <- g eta |w| / |g|, unless one of them is 0
                w_norms = torch.stack(torch._foreach_norm(w))
                g_norms = torch.stack(torch._foreach_norm(g))
                ratios = group["eta"] * w_norms / g_norms
                ratios = torch.where((w_norms > 0) & (g_norms > 0), ratios, 1)
                torch._foreach_mul_(g, ratios.unbind())
        super().step()


def build_optimizers(args, model):
    """The optimisers of the network, without weight decay of biases and norms, and of the probe."""
    params = [*model.encoder.parameters(), *model.projector.parameters()]
    weights = [p for p in params if p.ndim > 1]
    others = dict(params=[p for p in params if p.ndim <= 1], weight_decay=0.0)
    adamw = partial(torch.optim.AdamW, fused=True)
    probe = adamw(model.probe.parameters(), 1e-2, weight_decay=0.0)
    lr = args.lr * args.batch_size / 256
    if args.optimizer == "lars":
        weights = dict(params=weights, decay=args.weight_decay, eta=0.02)
        return LARS([weights, others], lr, momentum=0.9), probe
    weights = dict(params=weights, weight_decay=args.weight_decay)
    if args.optimizer == "sgd":
        return torch.optim.SGD([weights, others], lr, momentum=0.9), probe
    return adamw([weights, others], args.lr), probe


def schedule(step, steps, warmup):
    """The share of the learning rate at a step: a linear rise, then half a cosine."""
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    return (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2


def distribute(model, device):
    """The model, with gradients and batch norms of all processes' batch."""
    if not dist.is_initialized():
        return model
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:  # torch's SyncBatchNorm refuses CPUs
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.forward = partial(batch_norm_of_all, module, module.forward)
    net = nn.parallel.DistributedDataParallel(model)
    net.broadcast_buffers = False  # the processes' buffers agree
    return net


def batch_norm_of_all(module, batch_norm, x):
    if not module.training:
        return batch_norm(x)
    first = dist.get_rank() * len(x)
    return batch_norm(gather(x))[first : first + len(x)]


# ---- The run -------------------------------------------------------------------------------------


def update(net, criterion, optimizers, scaler, autocast, views, labels):
    """A step on views (2B, 3, S, S), a's before b's, and labels (B,) of this process's images.

    Returns terms, loss and the probe's top-1 in % by name, and all processes' embeddings of view a.
    """
    with autocast, record_function("network"):
        embeddings, logits = net(views)
    za, zb = (gather(z) for z in embeddings.chunk(2))
    with record_function("criterion"):
        terms = criterion(za, zb)
    loss = sum(terms.values())
    labels = labels.repeat(2)
    probe_loss = F.cross_entropy(logits.float(), labels)
    scaler.scale(loss + probe_loss).backward()
    for optimizer in optimizers:
        scaler.step(optimizer)
        optimizer.zero_grad()
    scaler.update()
    top1 = 100 * (logits.argmax(1) == labels).float().mean()
    return dict(terms, loss=loss, probe_train=top1), za.detach()


class Run:
    """A run's folder, where the first process writes log.jsonl, checkpoint.pt and encoder.pt."""

    def __init__(self, args, data, parts):
        self.args = args
        self.data = data
        self.parts = parts  # by name, all that has a state
        _, labels = data.sets["train"]
        self.settings = dict(vars(args), images=len(labels), classes=data.classes)
        self.out = Path(args.out)
        self.first = data.process.rank == 0
        self.steps = args.epochs * data.steps_per_epoch
        self.stop_signal = 0  # the number of a signal that has come
        self.test = None  # the last epoch's test accuracy
        self.looked_at = self.saved_at = time.perf_counter()

    def resume(self):
        """Continues from the first process's checkpoint, or begins. Returns the steps done."""
        saved = load_checkpoint(self.out / "checkpoint.pt") if self.first else None
        saved = saved or dict(settings={}, step=0, log_bytes=0, states={})
        for name, value in self.settings.items():
            old = saved["settings"].get(name, value)
            if old != value and name not in MAY_CHANGE:
                fail(f"{self.out} has a run with {name} {old}, not {value}: name another --out")
        if self.first:
            self.out.mkdir(parents=True, exist_ok=True)
            self.log = open(self.out / "log.jsonl", "ab", buffering=0)
            # drops what came after the checkpoint: all, if its log was deleted and begun again
            known = saved["log_bytes"]
            self.log.truncate(known if known <= self.log.tell() else 0)
        saved = self.data.process.share(saved)
        for name, state in saved["states"].items():
            if state:  # a scaler has none unless the precision was fp16
                self.parts[name].load_state_dict(state)
        if self.first and saved["step"] == 0:
            self.save(0)  # so that another run in this folder finds the settings
        return saved["step"]

    def ask_to_stop(self, number, frame):
        self.stop_signal = number

    def look(self, done, names, rows, za):
        """Logs the last steps, tests at an epoch's end, saves when due, stops if asked to.

        Only here, in fp16's scaler and in SyncBatchNorm does the host wait for the device. Returns
        what the progress bar shows.
        """
        process = self.data.process
        stop = process.largest(self.stop_signal)
        records = self.records(done, names, rows)
        seconds = time.perf_counter() - self.looked_at
        rate = len(records) * self.args.batch_size / seconds
        lr = self.parts["main"].param_groups[0]["lr"]
        status = dict(seconds=seconds, samples_per_s=rate, lr=lr)
        epoch_ends = done % self.data.steps_per_epoch == 0
        if epoch_ends:
            self.test = status["probe_test"] = probe_accuracy(self.parts["model"], self.data)
        if epoch_ends or done % 100 == 0:
            status |= {name: value.item() for name, value in diagnose(za).items()}
        last = records[-1]
        last.update(status)
        if self.first:
            self.log.write("".join(json.dumps(record) + "\n" for record in records).encode())
            waited = time.perf_counter() - self.saved_at
            if stop or done == self.steps or waited >= self.args.save_every:
                self.save(done)
        process.wait()  # ends here if the first process could not save
        if stop:
            say(f"stopped and saved after step {done}; the same command resumes the run")
            leave(128 + stop)
        self.looked_at = time.perf_counter()
        test = f" (test {self.test:.1f} %)" if self.test is not None else ""
        probe = f"probe {last['probe_train']:.1f} %{test}"
        return f"loss {last['loss']:.4g}, {probe}, {rate:.0f} samples/s"

    def records(self, done, names, rows):
        """The last steps' values, averaged over processes, a dict a step. Fails if not finite."""
        process = self.data.process
        rows = (process.sum(torch.stack(rows)) / process.world).tolist()
        records = []
        for step, row in enumerate(rows, done - len(rows)):
            values = dict(zip(names, row))
            for name, value in values.items():
                if not math.isfinite(value):
                    fail(f"{name} is {value} at step {step}; {self.out} keeps what it had", 1)
            records.append(dict(step=step, epoch=step // self.data.steps_per_epoch, **values))
        return records

    def save(self, done):
        model = self.parts["model"]
        if not all(weight.isfinite().all() for weight in model.parameters()):
            fail(f"weights are not finite after step {done - 1}; {self.out} keeps what it had", 1)
        states = {name: part.state_dict() for name, part in self.parts.items()}
        where = dict(settings=self.settings, step=done, log_bytes=self.log.tell())
        write_file(self.out / "encoder.pt", model.encoder.state_dict())
        write_file(self.out / "checkpoint.pt", dict(where, states=states))
        self.saved_at = time.perf_counter()


def write_file(path, content):
    """Saves an object to a file, as a whole or not at all."""
    buffer = io.BytesIO()  # torch.save to a path would report a full disk as a RuntimeError
    torch.save(content, buffer)
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(buffer.getbuffer())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_checkpoint(path):
    """A checkpoint, a dict, or None if there is none."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {name: saved[name] for name in ("settings", "step", "log_bytes", "states")}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:
        reason = f"damaged or of another version of train.py ({type(error).__name__})"
        fail(f"{path} is {reason}: move it away or name another folder")


@torch.no_grad()
def probe_accuracy(model, data):
    """Top-1 of the online probe on the test images, in %."""
    model.eval()
    right = torch.zeros((), device=data.process.device)
    for images, labels in data.plain("test"):
        with data.process.autocast():
            _, logits = model(images)
        right += (logits.argmax(1) == labels).sum()
    model.train()
    _, labels = data.sets["test"]
    return 100 * data.process.sum(right).item() / len(labels)


def train(args):
    process = start(args)
    data = Data(args, process)
    _, labels = data.sets["train"]
    if len(labels) < args.batch_size:
        fail(f"--batch-size {args.batch_size}: there are only {len(labels)} training images")
    torch.manual_seed(args.seed)
    model = Model(args.arch, args.image_size, args.projector, data.classes)
    model.to(process.device, memory_format=memory_format(process.device))
    optimizer, probe_optimizer = build_optimizers(args, model)
    scaler = torch.amp.GradScaler(process.device.type, enabled=process.precision == "fp16")
    parts = dict(model=model, main=optimizer, probe=probe_optimizer, scaler=scaler)
    run = Run(args, data, parts)
    net = distribute(model, process.device)
    criterion = partial(CRITERIA[args.criterion].terms, **args.set)
    if args.compile:
        net = torch.compile(net, dynamic=False)  # once for each of two sizes of views
        criterion = torch.compile(criterion)
    optimizers = optimizer, probe_optimizer
    learn = partial(update, net, criterion, optimizers, scaler, process.autocast())
    if args.profile:
        return profile(learn, data)

    done = run.resume()
    if done >= run.steps:
        return say(f"{run.out} is complete; more --epochs resume the run")
    on_signals(run.ask_to_stop)
    shape = f"{args.image_size} pixels, {args.arch}, {args.projector}, {args.optimizer}"
    place = f"{process.world} x {process.device.type} {process.precision}"
    say(f"{args.criterion}, {args.dataset}, {shape}, {place}, {run.out}")
    bar = tqdm(total=run.steps, initial=done, unit="step", disable=not run.first, mininterval=0.5)
    peak_lr = optimizer.defaults["lr"]
    rows = []
    for step, (views, labels) in enumerate(data.batches(done, run.steps), done):
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * schedule(step, run.steps, args.warmup)
        values, za = learn(views, labels)
        rows.append(torch.stack(list(values.values())).detach())
        asked = run.stop_signal and process.world == 1  # several must stop at the same step
        if (step + 1) % 20 == 0 or (step + 1) % data.steps_per_epoch == 0 or asked:
            text = run.look(step + 1, list(values), rows, za)
            bar.update(step + 1 - bar.n)
            bar.set_postfix_str(text)
            rows = []
    bar.close()
    say(f"{run.out}: online probe {run.test:.2f} % on test images; next: python eval.py {run.out}")


def profile(learn, data):
    """Says where the time of 20 steps goes, after 10 that warm up."""
    data.args.grow = 0  # all views of one size
    batches = data.batches(0, 30)
    for _, (views, labels) in zip(range(10), batches):
        learn(views, labels)
    with torch.profiler.profile() as profiler:
        for views, labels in batches:
            learn(views, labels)
    order = "cuda_time_total" if data.process.device.type == "cuda" else "cpu_time_total"
    say(profiler.key_averages().table(order, 30, max_name_column_width=40))


def main(argv=None):
    train(parse_args(argv))
    if dist.is_initialized():
        dist.destroy_process_group()  # after a failure this could wait for other processes


def run_program(program):
    """Calls program(). User errors end with one line, all errors with a status."""
    try:
        program()
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except Exception as error:
        if isinstance(error, OSError):
            reason = str(error).strip().rpartition("\n")[2]  # a reader's has a traceback before it
            message, status = f"stopped, what was saved is intact: {reason}", 2
        else:
            traceback.print_exc()
            message, status = "ended by the error above", 1
        error.__traceback__ = None  # it holds the image readers, and an exit would wait for them
        fail(message, status)


if __name__ == "__main__":
    run_program(main)
