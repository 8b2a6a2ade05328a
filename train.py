"""Pretrain an encoder with any criterion of duality.py. The same command again resumes the run.

python train.py --dataset shapes                             # no download, a minute on two cores
python train.py                                              # CIFAR-10, ResNet-18, VICReg
python train.py --criterion simclr --set temperature=0.15    # any criterion, any keyword of it
torchrun --nproc-per-node 8 train.py --dataset imagenet --data-dir imagenet --batch-size 1024
"""

import argparse
import atexit
import ctypes
import datetime
import functools
import inspect
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import traceback
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import distributed as dist
from torch import nn
from torch.profiler import record_function
from torch.utils.data import DataLoader
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from duality import CRITERIA, Gather, diagnose, gather

# What a run does where the command line is silent. LARS and SGD scale lr by batch size / 256.
DATASETS = {
    "cifar10": dict(arch="resnet18", epochs=100, image_size=32),
    "cifar100": dict(arch="resnet18", epochs=100, image_size=32),
    "imagenet": dict(arch="resnet50", epochs=100, image_size=224),
    "folder": dict(arch="resnet18", epochs=100, image_size=224),
    "shapes": dict(arch="small", epochs=12, image_size=32),
}
SMALL = dict(optimizer="adamw", lr=2e-3, weight_decay=1e-2, batch_size=128, grow=0.6)
SMALL |= dict(projector="512-512-512")
RESNET = dict(optimizer="lars", lr=0.1, weight_decay=1e-4, batch_size=256, grow=0.0)
RESNET |= dict(projector="2048-2048-2048")

MODELS = torchvision.models.list_models(torchvision.models)
ARCHS = ["small", *(name for name in MODELS if re.match("(wide_)?resne(x)?t", name))]
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
    """Ends this process with one line; before the processes have met, with one line a node."""
    if dist.is_initialized() or environment("LOCAL_RANK", 0) == 0:
        rank = f"rank {environment('RANK', 0)}: " if environment("WORLD_SIZE", 1) > 1 else ""
        tqdm.write(f"{Path(sys.argv[0]).name}: {rank}{message}", sys.stderr)
    raise SystemExit(status)


# ---- Settings ------------------------------------------------------------------------------------


def parse_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.error = lambda message: fail(f"{message} (-h lists the options)")
    pairs = dict(nargs="+", action="extend", default=[], metavar="NAME=VALUE")

    add = parser.add_argument_group("criterion").add_argument
    add("--criterion", choices=CRITERIA, default="vicreg", help="default: vicreg")
    add("--set", **pairs, help="hyperparameters, as temperature=0.15; a wrong name lists them")

    layout = "folder and imagenet have DIR/train/CLASS/IMAGE, DIR/val/... or DIR/test/..."
    add = parser.add_argument_group("data", layout).add_argument
    add("--dataset", choices=DATASETS, default="cifar10", help="default: cifar10")
    add("--data-dir", metavar="DIR", help="with the images; CIFAR is downloaded; default: data")
    add("--image-size", type=int, metavar="PIXELS", help="default: 32, imagenet and folder 224")
    add("--views", **pairs, help="of the augmentation, as grey=0.1; a wrong name lists them")
    add("--workers", type=int, metavar="N", help="that read files; default: the cores, at most 8")

    stem = "torchvision's ResNets have a 3x3 stem without max-pool up to 64 pixels"
    add = parser.add_argument_group("model", stem).add_argument
    add("--arch", choices=ARCHS, help="default: resnet18, imagenet resnet50, shapes small")
    projector = "widths of its layers; default: 2048-2048-2048, small 512-512-512"
    add("--projector", metavar="N-N-N", help=projector)

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, metavar="N", help="default: 100, shapes 12")
    add("--batch-size", type=int, metavar="N", help="of all processes; default: 256, small 128")
    add("--optimizer", choices=["lars", "sgd", "adamw"], help="default: lars, small adamw")
    add("--lr", type=float, help="times batch size / 256 unless adamw; default: 0.1, small 2e-3")
    add("--weight-decay", type=float, metavar="WD", help="default: 1e-4, small 0.01")
    warmup = "share of the steps in which the learning rate rises; default: 0.05"
    add("--warmup", type=float, default=0.05, metavar="SHARE", help=warmup)
    grow = "share of the steps, the first, on views of 5/8 of the size; default: 0, small 0.6"
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
    if args.dataset == "shapes" and args.data_dir:
        fail("--data-dir: shapes are made by the program, not read")
    defaults = dict(data_dir="data", workers=cores(), out=f"runs/{args.dataset}-{args.criterion}")
    defaults |= DATASETS[args.dataset]
    defaults |= SMALL if (args.arch or defaults["arch"]) == "small" else RESNET
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
    try:  # so that a value out of range is found now, not after the data are read
        Views(8, **args.views)
        embeddings = torch.randn(2, 4, int(args.projector.split("-")[-1]))
        CRITERIA[args.criterion](*embeddings, **args.set)
    except (ArithmeticError, ValueError) as error:
        fail(f"--set or --views: {error}")


def cores():
    """The number of cores that this process may use, at most eight."""
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))
    return min(8, max(1, len(affinity(0)) // environment("LOCAL_WORLD_SIZE", 1)))


def keywords(flag, pairs, function):
    """NAME=VALUE texts as keyword arguments of the function; its defaults tell their types."""
    parameters = inspect.signature(function).parameters.items()
    known = {name: p.default for name, p in parameters if p.default is not p.empty}
    found = {}
    for name, _, text in (pair.partition("=") for pair in pairs):
        try:
            found[name] = type(known[name])(text)
            valid = isinstance(found[name], str) or math.isfinite(found[name])
        except (KeyError, ValueError):
            valid = False
        if not valid:
            choices = ", ".join(f"{name}={default}" for name, default in known.items())
            fail(f"{flag} {name}={text}: there is {choices}")
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

    def together(self, function, *args):
        """function(*args) in every process. If one of them fails, all of them end."""
        result = error = None
        try:
            result = function(*args)
        except (OSError, SystemExit) as caught:
            error = caught
        if self.largest(int(error is not None)):
            raise error or SystemExit(2)
        return result

    def largest(self, number):
        number = torch.tensor(number)
        if self.world > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self.control)
        return number.item()

    def share(self, value):
        """The first process's value, in all of them."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values, group=self.control)
        return values[0]

    def autocast(self):
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "fp32")

    def mean(self, tensor):
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor / self.world


def start(args):
    """This process, on the best device in its fastest precision, joined to torchrun's others."""
    world = environment("WORLD_SIZE", 1)
    if args.batch_size % world or args.batch_size < 2 * world:
        fail(f"--batch-size {args.batch_size} does not divide into {world} parts of at least 2")
    device = choose_device(args.device, world)
    precision = fastest_precision(device) if args.precision == "auto" else args.precision
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
        torch.set_float32_matmul_precision("high")  # TF32 is more precise than bf16 features are
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        # keep freed memory: to ask the system for it again takes a fifth of a step
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
    if world == 1:
        return Process(device, precision)
    backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(backend, device_id=device_id)
    control = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
    return Process(device, precision, dist.get_rank(), world, control)


def choose_device(wanted, world):
    available = ["cpu"]
    if torch.backends.mps.is_available() and world == 1:  # no backend sends its tensors
        available.insert(0, "mps")
    if torch.cuda.is_available() and (world == 1 or dist.is_nccl_available()):
        available.insert(0, "cuda")
    if wanted not in ("auto", *available):
        names = ", ".join(available)
        fail(f"--device {wanted}: not available here for {world} process(es), only {names}")
    kind = available[0] if wanted == "auto" else wanted
    return torch.device(kind, environment("LOCAL_RANK", 0) if kind == "cuda" else None)


def fastest_precision(device):
    if device.type == "cuda":  # older GPUs emulate bf16, slowly
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    fast_on_cpu = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)
    return "bf16" if device.type == "cpu" and fast_on_cpu() else "fp32"


def memory_format(device):
    # in channels_last, MPS computes a wrong gradient of batch norm (pytorch issue 175189)
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def generator(device, *key):
    """A random generator that depends on nothing but its key of whole numbers."""
    return torch.Generator(device).manual_seed(zlib.crc32(repr(key).encode()))


# ---- Data ----------------------------------------------------------------------------------------


def shapes(n, seed, size=32):
    """uint8 images (n, 3, size, size), labels (n,): four copies of a shape, the rest random."""
    draw, labels = generator("cpu", seed, 0, 9), torch.arange(n) % 8
    axis = (torch.arange(2 * size) + 0.5) / size * 2 - 2  # at twice the resolution
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, 1, 1, generator=draw)

    def texture(low, high):
        angle, frequency, amplitude = uniform(0, math.pi), uniform(2, 15), uniform(-0.2, 0.2, 3)
        waves = (frequency * (angle.cos() * x + angle.sin() * y)).sin()[:, None]
        return uniform(low, high, 3) + amplitude * waves

    images = texture(0, 0.5)
    for row, column in ((-1, -1), (-1, 1), (1, -1), (1, 1)):  # the quarters of the image
        scale, tilt = uniform(0.4, 0.95), uniform(-0.5, 0.5)
        u = (x - column - uniform(-0.4, 0.4)) / scale
        v = (y - row - uniform(-0.4, 0.4)) / scale
        u, v = tilt.cos() * u + tilt.sin() * v, tilt.cos() * v - tilt.sin() * u
        inside = shape_masks(u, v)[labels, torch.arange(n), None]
        images = torch.where(inside, texture(0.5, 1), images)
    images = torch.where(uniform(0, 1, 1) < 0.5, images, 1 - images)
    return (F.avg_pool2d(images.clamp(0, 1), 2) * 255).round().byte(), labels


def shape_masks(u, v):
    """The points (u, v) that each of the eight shapes covers."""
    radius, across, along = (u * u + v * v).sqrt(), u.abs(), v.abs()
    inner, outer = torch.minimum(across, along), torch.maximum(across, along)
    disc, ring = radius < 0.9, (radius < 1) & (radius > 0.6)
    square, frame = outer < 0.8, (outer < 0.9) & (outer > 0.5)
    triangle, cross = (v < 0.7) & (v > 2 * across - 0.9), (inner < 0.25) & (outer < 1)
    bars, posts = (along > 0.3) & (outer < 0.9), (across > 0.3) & (outer < 0.9)
    return torch.stack((disc, ring, square, frame, triangle, cross, bars, posts))


class Files(torchvision.datasets.ImageFolder):
    """Batches by (indices, seed): uint8 crops (k, B, 3, S, S), two random ones or, where seed is
    None, the centre; labels (B,); the paths that cannot be read, which a grey image replaces."""

    def __init__(self, folder, size, least_area):
        try:
            super().__init__(folder)
        except FileNotFoundError as error:  # no folder, no class, or a class without images
            reason = str(error).splitlines()[0]
            fail(f"{folder}: {reason}; --data-dir DIR has DIR/train/CLASS/IMAGE")
        self.size, self.labels = size, torch.tensor(self.targets)
        self.random_crop = RandomResizedCrop(size, (least_area or 1, 1))

    def __getitem__(self, key):
        indices, seed = key
        batch, unreadable = [], []
        for i in indices.tolist():
            path, _ = self.samples[i]
            try:
                with Image.open(path) as file:
                    file.draft("RGB", (2 * self.size, 2 * self.size))  # reads a large JPEG smaller
                    image = file.convert("RGB")
            except Exception:  # a damaged file makes PIL raise about anything
                image = Image.new("RGB", (1, 1), "grey")
                unreadable.append(path)
            if seed is None:
                crops = [ImageOps.fit(image, (self.size, self.size), Image.Resampling.BILINEAR)]
            else:
                torch.manual_seed((seed * 1_000_003 + i) % 2**63)  # nothing else draws from it
                crops = [self.random_crop(image), self.random_crop(image)]
            batch.append(torch.stack([pil_to_tensor(crop) for crop in crops]))
        return torch.stack(batch, 1), self.labels[indices], unreadable

    def stream(self, keys, workers, pin_memory=False):
        """Reads by one pool of processes, however often it is iterated."""
        options = dict(num_workers=workers, persistent_workers=workers > 0, pin_memory=pin_memory)
        if workers and sys.platform == "linux":
            options["multiprocessing_context"] = "fork"  # has imported torch already
        ignore = functools.partial(on_signals, signal.SIG_IGN)  # the run ends its workers
        return DataLoader(self, batch_size=None, sampler=keys, worker_init_fn=ignore, **options)

    def read_all(self, workers):
        """Images (N, 3, S, S) and labels (N,) of all files."""
        images = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8)
        unreadable = []
        keys = [(part, None) for part in torch.arange(len(self)).split(500)]
        loader = tqdm(self.stream(keys, workers), "reading images", leave=False, disable=None)
        for part, (crops, _, paths) in zip(images.split(500), loader):
            part.copy_(crops[0])
            unreadable += paths
        if unreadable:
            fail(f"{len(unreadable)} of {len(self)} images cannot be read: {', '.join(unreadable)}")
        return images, self.labels


def on_signals(handler, worker=None):
    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)


def load(args):
    """Training and test set: uint8 images (N, 3, H, W), or Files if they are many, and labels."""
    root = Path(args.data_dir)
    if args.dataset == "shapes":
        images, labels = zip(*(shapes(500, seed) for seed in range(14)))
        return [(torch.cat(images[i:j]), torch.cat(labels[i:j])) for i, j in ((0, 10), (10, 14))]
    if args.dataset in ("cifar10", "cifar100"):
        kind = getattr(torchvision.datasets, args.dataset.upper())
        try:
            sets = [kind(root, train=train, download=True) for train in (True, False)]
        except Exception as error:
            missing = f"{args.dataset} is not in {root}, and its download failed ({error})"
            fail(f"{missing}: put its archive there, name another --data-dir, or try shapes")
        return [(torch.tensor(s.data.transpose(0, 3, 1, 2)), torch.tensor(s.targets)) for s in sets]
    test = "val" if (root / "val").is_dir() else "test"
    least_area = Views(8, **args.views).crop
    sets = [Files(root / split, args.image_size, least_area) for split in ("train", test)]
    if sets[0].classes != sets[1].classes:
        fail(f"{root}: train and {test} have different classes")
    if sum(map(len, sets)) * 3 * args.image_size**2 <= RESIDENT_BYTES:
        return [files.read_all(args.workers) for files in sets]
    return [(files, files.labels) for files in sets]


def load_in_turn(args, process):
    """load(args): in the first process, then in one of each other node, then in the others."""
    # So each node downloads once, and nodes that share a disk do not both write to it.
    mine = 0 if process.rank == 0 else 1 if environment("LOCAL_RANK", 0) == 0 else 2
    for turn in range(3):
        if turn == mine:
            sets = process.together(load, args)
        else:
            process.together(lambda: None)
    return sets


class Data:
    """Training images in batches of two views, and the images of either set as they are.

    Views depend on seed and step, not on the number of processes or on whether a run was resumed.
    """

    def __init__(self, args, process):
        self.args, self.process = args, process
        self.sets = dict(zip(("train", "test"), load_in_turn(args, process)))
        images, labels = self.sets["train"]
        self.classes, self.steps_per_epoch = 1 + int(labels.max()), len(labels) // args.batch_size
        self.views = Views(args.image_size, **args.views)
        self.whole = Views(args.image_size, crop=0, flip=0, jitter=0, grey=0)
        self.loaders, self.unreadable = {}, set()
        atexit.register(self.loaders.clear)  # ends their processes, which heed no signal
        if isinstance(images, Files):
            self.views.crop = 0  # files are cropped where they are read
        else:
            for split, pair in self.sets.items():
                self.sets[split] = [tensor.to(process.device) for tensor in pair]
        if args.compile:
            self.views.apply = torch.compile(self.views.apply, dynamic=False)

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def order(self, epoch):
        _, labels = self.sets["train"]
        draw = generator("cpu", self.args.seed, epoch, 2)
        return torch.randperm(len(labels), generator=draw).to(labels.device)

    def batches(self, first, steps):
        """Yields views (2B, 3, S, S), a's before b's, and labels (B,) of steps from first on."""
        seed, process = self.args.seed, self.process
        keys = ((self.indices(step), seed * 1_000_003 + step) for step in range(first, steps))
        full_size = self.args.image_size
        self.loaders.pop("train", None)  # whose keys were others
        for step, (images, labels) in enumerate(self.fetch("train", keys), first):
            grown = step >= self.args.grow * steps
            self.views.image_size = full_size if grown else max(8, full_size * 5 // 8)
            images = images.expand(2, -1, -1, -1, -1)
            draw = generator(process.device, seed, step)
            yield self.views(images, draw, process.rank, process.world), labels

    def indices(self, step):
        """This process's share of a step's training images."""
        epoch, i = divmod(step, self.steps_per_epoch)
        batch = self.order(epoch)[i * self.args.batch_size :][: self.args.batch_size]
        return batch.chunk(self.process.world)[self.process.rank]

    def plain(self, split, batch=500):
        """Yields (images, labels) of this process's share of a set, resized and normalised."""
        _, labels = self.sets[split]
        shares = torch.arange(self.process.rank, len(labels), self.process.world).split(batch)
        for images, labels in self.fetch(split, [(share, None) for share in shares]):
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
        for crops, labels, paths in self.loaders[split]:
            for path in set(paths) - self.unreadable:
                say(f"{path} cannot be read: a grey image replaces it")
            self.unreadable.update(paths)
            yield crops.to(device, non_blocking=True), labels.to(device, non_blocking=True)


# ---- Views ---------------------------------------------------------------------------------------


def luma(rgb):
    """The grey (B, P) of colour planes (3, B, P)."""
    red, green, blue = rgb
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def adjust_hue(rgb, turn):
    """Turns the hue of planes (3, B, P), in place, by turn (B, 1) of a circle, as HSV has it."""
    red, green, blue = rgb
    high, low = rgb.amax(0), rgb.amin(0)
    chroma = high - low
    scale = chroma.clamp_min(1e-12).reciprocal_()
    # With A = (green - blue) / chroma, the angle from red, in sixths of a circle, is |A| where red
    # is highest (X = -1), 3 - |A| where it is lowest (X = 1), linear in X between. Its sign is A's.
    a = (green - blue).mul_(scale)
    x = (high + low).sub_(red, alpha=2).mul_(scale)
    sixths = x.mul_(a.abs().neg_().add_(1.5)).add_(1.5).copysign_(a)
    hue = sixths.mul_(1 / 6).add_(turn + 1).frac_()  # in [0, 1)
    # And back: red is low around 1/2, green high around 1/3, blue high around 2/3. Each changes by
    # chroma where hue is between 1/6 and 1/3 away from there.
    below, above = low.sub_(chroma), high.add_(chroma)
    planes = (red, below, 1 / 2, 6), (green, above, 1 / 3, -6), (blue, above, 2 / 3, -6)
    for plane, base, centre, slope in planes:
        away = (hue - centre).abs_().clamp_(1 / 6, 1 / 3)
        torch.addcmul(base, away, chroma, value=slope, out=plane)


def resampling(start, length, size, out):
    """Antialiased resize of [start, start + length), (B, 1), as weights (B, out, size) of pixels.

    A negative length goes backwards, which mirrors the image.
    """
    # weight of pixel j in output o ~ max(0, s - |j + 1/2 - c_o|), s = max(1, |r|),
    # c_o = start + (o + 1/2) r, r = length / out
    start, length = start[..., None], length[..., None]
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

    All in [0, 1]: crop is the least share of the area, 0 for the whole image; flip, jitter, grey,
    blur and solarise are probabilities; brightness to hue are the jitter's strengths, in order.
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

        def uniform(low, high):
            return low + (high - low) * torch.rand(n, 1, device=device, generator=generator)

        def chance(probability):
            return (uniform(0, 1) < probability).float()

        # as torchvision's RandomResizedCrop, but a side that is too long is cut, not drawn again
        area = uniform(self.crop, 1) * height * width
        aspect = uniform(math.log(3 / 4), math.log(4 / 3)).exp()
        h = (area / aspect).sqrt().clamp(1, height) if self.crop else height + 0 * area
        w = (area * aspect).sqrt().clamp(1, width) if self.crop else width + 0 * area
        top, left = uniform(0, 1) * (height - h), uniform(0, 1) * (width - w)
        flip, jitter = chance(self.flip), chance(self.jitter)
        # a flipped view goes backwards from its right edge
        p = dict(top=top, height=h, left=left + flip * w, width=(1 - 2 * flip) * w)
        for name in ("brightness", "contrast", "saturation"):
            p[name] = 1 + jitter * getattr(self, name) * uniform(-1, 1)
        p.update(hue=jitter * self.hue * uniform(-1, 1), grey=chance(self.grey))
        p.update(sigma=1e-3 + chance(self.blur) * uniform(0.1, 2), solarise=chance(self.solarise))
        return p

    def apply(self, images, p):
        """Views (B, 3, S, S) of uint8 images (B, 3, H, W) by parameters p, as in torchvision."""
        n, _, height, width = images.shape
        size = self.image_size
        rows = resampling(p["top"], p["height"], height, size) * (p["brightness"][..., None] / 255)
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
        n, size = k * b, self.image_size
        p = self.draw(n * world, height, width, images.device, generator)
        p = {name: p[name].view(k, world, b)[:, rank].reshape(n, 1) for name in p}
        images, views = images.flatten(0, 1), torch.empty(n, 3, size, size, device=images.device)
        views = views.to(memory_format=memory_format(images.device))
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
        layers, (*hidden, last) = [], map(int, projector.split("-"))
        for n in hidden:
            layers += [nn.Linear(width, n, bias=False), nn.BatchNorm1d(n), nn.ReLU(True)]
            width = n
        self.projector = nn.Sequential(*layers, nn.Linear(width, last, bias=False))

    def forward(self, images):
        features = self.encoder(images)
        return self.projector(features), self.probe(features.detach())


def small():
    """An encoder for CPUs, and its number of features."""
    layers, width = [], 3
    for n in (32, 64, 128, 256):
        pool = nn.MaxPool2d(2, ceil_mode=True) if n < 256 else nn.Identity()
        convolution = nn.Conv2d(width, n, 3, padding=1, bias=False)
        layers += [convolution, pool, nn.BatchNorm2d(n), nn.ReLU(True)]
        width = n
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), width


def resnet(arch, image_size):
    """torchvision's ResNet, for small images with a 3x3 stem and no max-pool; its features."""
    encoder = torchvision.models.get_model(arch, weights=None)
    features, encoder.fc = encoder.fc.in_features, nn.Identity()
    if image_size <= 64:
        encoder.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        encoder.maxpool = nn.Identity()
    return encoder, features


class LARS(torch.optim.Optimizer):
    """SGD with momentum 0.9, of gradients that adapt makes eta |w| long (arXiv 1708.03888)."""

    def __init__(self, params, lr, weight_decay=0.0, eta=0.02, adapt=True):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, eta=eta, adapt=adapt))
        for p in itertools.chain(*(group["params"] for group in self.param_groups)):
            self.state[p]["momentum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            w = [p for p in group["params"] if p.grad is not None]
            v = [self.state[p]["momentum"] for p in w]
            # g <- g + decay w
            g = torch._foreach_add([p.grad for p in w], w, alpha=group["weight_decay"])
            if group["adapt"]:
                # g <- g eta |w| / |g|, unless one of them is 0
                w_norms, g_norms = (torch.stack(torch._foreach_norm(tensors)) for tensors in (w, g))
                ratios = group["eta"] * w_norms / g_norms
                ratios = torch.where((w_norms > 0) & (g_norms > 0), ratios, 1)
                torch._foreach_mul_(g, ratios.unbind())
            # v <- 0.9 v + g,  w <- w - lr v
            torch._foreach_mul_(v, 0.9)
            torch._foreach_add_(v, g)
            torch._foreach_add_(w, v, alpha=-group["lr"])


def build_optimizers(args, model):
    """The network's optimiser, which spares biases and norms decay and adaptation; the probe's."""
    params = [*model.encoder.parameters(), *model.projector.parameters()]
    weights = dict(params=[p for p in params if p.ndim > 1], weight_decay=args.weight_decay)
    others = dict(params=[p for p in params if p.ndim <= 1], weight_decay=0.0)
    adamw = functools.partial(torch.optim.AdamW, fused=params[0].device.type != "mps")
    probe = adamw(model.probe.parameters(), 1e-2, weight_decay=0.0)
    if args.optimizer == "adamw":
        return adamw([weights, others], args.lr), probe
    lr = args.lr * args.batch_size / 256
    if args.optimizer == "sgd":
        return torch.optim.SGD([weights, others], lr, momentum=0.9), probe
    return LARS([weights, dict(others, adapt=False)], lr), probe


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
    else:  # torch has no SyncBatchNorm for CPUs
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.forward = functools.partial(batch_norm_of_all, module, module.forward)
    model = nn.parallel.DistributedDataParallel(model)
    model.broadcast_buffers = False  # batch norms already agree
    return model


def batch_norm_of_all(module, batch_norm, x):
    if not module.training:
        return batch_norm(x)
    first = dist.get_rank() * len(x)
    return batch_norm(GatherSum.apply(x))[first : first + len(x)]


class GatherSum(Gather):
    """All processes' rows. The gradient is the sum of what all processes have for this one's."""

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


# ---- The run -------------------------------------------------------------------------------------


def update(net, criterion, optimizers, scaler, autocast, views, labels):
    """A step on views (2B, 3, S, S), a's before b's, and labels (B,) of this process's images.

    Returns the criterion's terms, the online probe's accuracy, all processes' embeddings of view a.
    """
    with autocast, record_function("network"):
        embeddings, logits = net(views)
    za, zb = (gather(z) for z in embeddings.chunk(2))
    with record_function("criterion"):
        terms = criterion(za, zb)
    labels = labels.repeat(2)
    loss = sum(terms.values()) + F.cross_entropy(logits.float(), labels)
    scaler.scale(loss).backward()
    for optimizer in optimizers:
        scaler.step(optimizer)
        optimizer.zero_grad()
    scaler.update()
    accuracy = (logits.argmax(1) == labels).float().mean()
    return terms, accuracy, za.detach()


class Run:
    """A run's folder, where the first process writes log.jsonl, checkpoint.pt and encoder.pt."""

    def __init__(self, args, data, parts):
        self.args, self.data, self.parts = args, data, parts  # parts: by name, all that has a state
        self.out, self.first = Path(args.out), data.process.rank == 0
        self.steps = args.epochs * data.steps_per_epoch
        self.signal, self.test = 0, None  # that asks to stop; the last epoch's test accuracy
        self.looked = self.saved = time.perf_counter()

    def load(self):
        """The first process's checkpoint, if there is one, of a run with the same settings."""
        saved = load_checkpoint(self.out / "checkpoint.pt") if self.first else None
        for name, value in vars(self.args).items():
            old = saved["settings"].get(name) if saved else value
            if old != value and name not in MAY_CHANGE:
                fail(f"{self.out} has a run with {name} {old}, not {value}: name another --out")
        return saved

    def resume(self, saved):
        """Continues from a checkpoint, or begins. Returns the number of steps done."""
        if saved:
            for name, part in self.parts.items():
                if saved["states"][name]:  # a scaler has none unless the precision was fp16
                    part.load_state_dict(saved["states"][name])
        if self.first:
            self.out.mkdir(parents=True, exist_ok=True)
            self.log = open(self.out / "log.jsonl", "ab", buffering=0)
            self.log.truncate(min(saved["log_bytes"], self.log.tell()) if saved else 0)
        return saved["step"] if saved else 0

    def ask_to_stop(self, number, frame):
        self.signal = number

    def look(self, done, names, rows, za):
        """Logs the last steps, tests at an epoch's end, saves in time, stops if asked to.

        Only here does the host wait for the device. Returns what the progress bar shows.
        """
        process = self.data.process
        stop = process.largest(self.signal)
        rows = process.mean(torch.stack(rows)).tolist()
        seconds = time.perf_counter() - self.looked
        rate = len(rows) * self.args.batch_size / seconds
        lr = self.parts["main"].param_groups[0]["lr"]
        status = dict(seconds=seconds, samples_per_s=rate, lr=lr)
        epoch_ends = done % self.data.steps_per_epoch == 0
        if epoch_ends:
            self.test = status["probe_test"] = probe_accuracy(self.parts["model"], self.data)
        watched = za if epoch_ends or done % 100 == 0 else None
        last = stop or done == self.steps
        process.together(self.record, done, names, rows, watched, status, last)
        if stop:
            say(f"stopped and saved after step {done}; the same command resumes the run")
            raise SystemExit(128 + stop)
        self.looked = time.perf_counter()
        loss, accuracy = sum(rows[-1][:-1]), 100 * rows[-1][-1]
        test = f" (test {self.test:.1f} %)" if self.test else ""
        return f"loss {loss:.4g}, probe {accuracy:.1f} %{test}, {rate:.0f} samples/s"

    def record(self, done, names, rows, za, status, last):
        """Writes steps, their status and za's diagnosis to the log, and in time the checkpoint."""
        if not self.first:
            return
        records = []
        for step, row in enumerate(rows, done - len(rows)):
            where = dict(step=step, epoch=step // self.data.steps_per_epoch)
            records.append(where | dict(loss=sum(row[:-1])) | dict(zip(names, row)))
            for name, value in zip(names, row):
                if not math.isfinite(value):
                    fail(f"{name} is {value} at step {step}; {self.out} keeps what it had", 1)
        if za is not None:
            status |= {name: value.item() for name, value in diagnose(za).items()}
        records.append(where | status)
        self.log.write("".join(json.dumps(record) + "\n" for record in records).encode())
        if last or time.perf_counter() - self.saved >= self.args.save_every:
            self.save(done)

    def save(self, done):
        model = self.parts["model"]
        if not all(weight.isfinite().all() for weight in model.parameters()):
            fail(f"weights are not finite after step {done - 1}; {self.out} keeps what it had", 1)
        os.fsync(self.log.fileno())
        states = {name: part.state_dict() for name, part in self.parts.items()}
        where = dict(settings=vars(self.args), step=done, log_bytes=self.log.tell())
        write_file(self.out / "encoder.pt", to_bytes(model.encoder.state_dict()))
        write_file(self.out / "checkpoint.pt", to_bytes(where | dict(states=states)))
        self.saved = time.perf_counter()


def to_bytes(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def write_file(path, content):
    """Writes bytes to a file, as a whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_checkpoint(path):
    """A checkpoint, a dict, or None if there is none."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {name: saved[name] for name in ("settings", "step", "log_bytes", "states")}
    except FileNotFoundError:
        return None
    except Exception as error:
        reason = f"damaged or of another version of train.py ({type(error).__name__})"
        fail(f"{path} is {reason}: move it away or name another --out")


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
    return 100 * data.process.mean(right).item() * data.process.world / len(labels)


def train(args):
    process = start(args)
    data = Data(args, process)
    if data.steps_per_epoch == 0:
        _, labels = data.sets["train"]
        fail(f"--batch-size {args.batch_size}: there are only {len(labels)} training images")

    torch.manual_seed(args.seed)
    model = Model(args.arch, args.image_size, args.projector, data.classes)
    model.to(process.device, memory_format=memory_format(process.device))
    main, probe = build_optimizers(args, model)
    scaler = torch.amp.GradScaler(process.device.type, enabled=process.precision == "fp16")
    run = Run(args, data, dict(model=model, main=main, probe=probe, scaler=scaler))
    net = distribute(model, process.device)
    criterion = functools.partial(CRITERIA[args.criterion].terms, **args.set)
    if args.compile:
        net, criterion = torch.compile(net), torch.compile(criterion)
    learn = functools.partial(update, net, criterion, (main, probe), scaler, process.autocast())
    if args.profile:
        args.grow = 0
        return profile(args, learn, data.batches(0, 60))

    done = process.together(run.resume, process.share(process.together(run.load)))
    if done >= run.steps:
        return say(f"{run.out} is complete; more --epochs resume the run")
    on_signals(run.ask_to_stop)
    shape = f"{args.image_size} pixels, {args.arch}, {args.projector}, {args.optimizer}"
    place = f"{process.world} x {process.device.type} {process.precision}"
    say(f"{args.criterion}, {args.dataset}, {shape}, {place}, {run.out}")
    bar = tqdm(total=run.steps, initial=done, unit="step", disable=not run.first, mininterval=0.5)
    rows, peak_lr = [], main.defaults["lr"]
    for step, (views, labels) in enumerate(data.batches(done, run.steps), done):
        for group in main.param_groups:
            group["lr"] = peak_lr * schedule(step, run.steps, args.warmup)
        terms, accuracy, za = learn(views, labels)
        rows.append(torch.stack([*terms.values(), accuracy]).detach())
        asked = run.signal and process.world == 1
        if (step + 1) % 20 == 0 or (step + 1) % data.steps_per_epoch == 0 or asked:
            text = run.look(step + 1, [*terms, "probe_train"], rows, za)
            bar.update(step + 1 - bar.n)
            bar.set_postfix_str(text)
            rows = []
    bar.close()
    say(f"{run.out}: online probe {run.test:.2f} % on test images; next: python eval.py {run.out}")


def profile(args, learn, batches):
    """Says how many samples a second 45 steps take, and where the time of 10 more goes."""

    def run(steps):
        start = time.perf_counter()
        for views, labels in itertools.islice(batches, steps):
            _, accuracy, _ = learn(views, labels)
        accuracy.item()  # waits for the device
        return steps * args.batch_size / (time.perf_counter() - start)

    run(5)
    rate = run(45)
    with torch.profiler.profile() as profiler:
        run(10)
    order = "cuda_time_total" if torch.cuda.is_available() else "cpu_time_total"
    say(profiler.key_averages().table(order, 30, max_name_column_width=40))
    say(f"{rate:.0f} samples/s, two views each, when not profiled")


def main(argv=None):
    train(parse_args(argv))
    if dist.is_initialized():
        dist.destroy_process_group()  # after a failure this could wait for other processes


def run_program(program):
    """Calls program(); what a user can cause ends it with one line, any error with a status."""
    try:
        program()
    except OSError as error:
        fail(f"stopped, what was saved is intact: {error}")
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None  # which frees the frames, and with them Data's processes


if __name__ == "__main__":
    run_program(main)
