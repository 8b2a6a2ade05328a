"""Pretrain an encoder with any criterion of duality.py.

    python train.py --dataset shapes                             # no download, two minutes on two CPU cores
    python train.py                                              # CIFAR-10, ResNet-18, VICReg
    python train.py --criterion simclr --set temperature=0.15    # any criterion, any keyword of it
    torchrun --nproc-per-node 8 train.py --dataset imagenet --data-dir imagenet --batch-size 1024

The run's folder gets log.jsonl, a line a step, encoder.pt, and checkpoint.pt, from which the same command goes on.
"""
import argparse
import functools
import inspect
import json
import math
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace as Namespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision import transforms
from tqdm import tqdm

import duality

# What a run does where the command line is silent. lr is for a batch of 256, scaled with it for LARS and SGD.
DATASETS = {
    "cifar10": dict(arch="resnet18", epochs=100, image_size=32),
    "cifar100": dict(arch="resnet18", epochs=100, image_size=32),
    "imagenet": dict(arch="resnet50", epochs=100, image_size=224),
    "folder": dict(arch="resnet18", epochs=100, image_size=224),
    "shapes": dict(arch="small", epochs=15, image_size=32)}
SMALL = dict(optimizer="adamw", lr=2e-3, weight_decay=1e-2, projector="512-512-512")
RESNET = dict(optimizer="lars", lr=0.3, weight_decay=1e-4, projector="2048-2048-2048")
RESNETS = [n for n in torchvision.models.list_models(torchvision.models) if re.match("(wide_)?resne(x)?t", n)]
RESIDENT_BYTES = 4 * 2**30  # images that take up to this are held on the device, more are streamed
LOOK_EVERY = 20  # steps between looks at the device's numbers

def fail(message):
    """Ends the program with one line and exit status 2."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)

# --- Settings -----------------------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (-h lists the options)")

def number(kind, least, greatest=10**9):
    def parse(text):
        if not least <= kind(text) <= greatest:
            raise argparse.ArgumentTypeError(f"{text} is not between {least:g} and {greatest:g}")
        return kind(text)
    parse.__name__ = kind.__name__  # for argparse's "invalid int value"
    return parse

def widths(text):
    if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layer widths such as 2048-2048-512")
    return text

def assignment(text):
    name, _, value = text.partition("=")
    return name, float(value) if re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", value) else value

def keywords(flag, pairs, function):
    """The assignments of a flag as keywords of `function`; refused where it has none of that name and type."""
    known = {k: p.default for k, p in inspect.signature(function).parameters.items() if p.default is not p.empty}
    for name, value in pairs:
        if name not in known or isinstance(value, str) != isinstance(known[name], str):
            fail(f"{flag} {name}={value}: there is {', '.join(f'{k}={v}' for k, v in known.items())}")
    return dict(pairs)

def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument_group("criterion").add_argument
    add("--criterion", default="vicreg", choices=duality.CRITERIA, metavar="NAME",
        help=f"default: vicreg; there is {', '.join(duality.CRITERIA)}")
    add("--set", nargs="+", default=[], type=assignment, metavar="KEY=VALUE",
        help="the criterion's hyperparameters, such as temperature=0.15")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="cifar10", choices=DATASETS, metavar="NAME",
        help=f"default: cifar10; there is {', '.join(DATASETS)}; imagenet and folder are DIR/train/CLASS/IMAGE and "
             "DIR/val/... or DIR/test/...")
    add("--data-dir", type=Path, metavar="DIR", help="default: data; CIFAR is downloaded there")
    add("--image-size", type=number(int, 8, 1024), metavar="PIXELS", help="default: 32, imagenet and folder 224")
    add("--views", nargs="+", default=[], type=assignment, metavar="KEY=VALUE",
        help="probabilities and strengths of the views, such as grey=0.1 blur=0.5")
    add("--workers", type=number(int, 0, 256), default=min(8, os.cpu_count()), metavar="N",
        help="processes that read images which are not held on the device")
    add = parser.add_argument_group("model").add_argument
    add("--arch", choices=["small", *RESNETS], metavar="NAME",
        help="small or a ResNet of torchvision, with a 3x3 stem without max-pool for images up to 64 pixels; "
             "default: resnet18, shapes small, imagenet resnet50")
    add("--projector", type=widths, metavar="X-Y-Z", help="layer widths; default: 2048-2048-2048, small 512-512-512")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=number(int, 1), metavar="N", help="default: 100, shapes 15")
    add("--batch-size", type=number(int, 2), default=256, metavar="N", help="of all processes; default: 256")
    add("--optimizer", choices=("lars", "sgd", "adamw"), help="default: lars, small adamw")
    add("--lr", type=number(float, 1e-9), metavar="X",
        help="for a batch of 256; lars and sgd scale it with the batch; default: 0.3, small 0.002")
    add("--weight-decay", type=number(float, 0), metavar="X", help="default: 1e-4, small 0.01")
    add("--warmup", type=number(float, 0, 1), default=0.05, metavar="X", help="share of the steps; default: 0.05")
    add = parser.add_argument_group("running").add_argument
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    add("--precision", default="auto", choices=("auto", "bf16", "fp16", "fp32"), help="of the network")
    add("--compile", action="store_true", help="torch.compile network and views")
    add("--seed", type=number(int, 0), default=0, metavar="N")
    add("--out", type=Path, metavar="DIR", help="the run's folder; default: runs/DATASET-CRITERION")
    add("--save-every", type=number(float, 0), default=120, metavar="SECONDS", help="default: 120")
    add("--profile", action="store_true", help="time the parts of 50 steps, save nothing")
    args = parser.parse_args(argv)
    if args.dataset == "shapes" and args.data_dir:
        fail("--data-dir: shapes are made by the program, not read")
    for defaults in (DATASETS[args.dataset], SMALL if (args.arch or DATASETS[args.dataset]["arch"]) == "small" else RESNET):
        vars(args).update({k: v for k, v in defaults.items() if getattr(args, k) is None})
    criterion = duality.CRITERIA[args.criterion]
    args.set = keywords("--set", args.set, criterion)
    args.views = keywords("--views", args.views, Views.__init__)
    try:
        Views(8, **args.views)
        criterion(*torch.randn(2, 4, int(args.projector.split("-")[-1])), **args.set)
    except ValueError as error:
        fail(error)
    args.data_dir, args.out = (str(path) for path in (
        args.data_dir or "data", args.out or Path("runs", f"{args.dataset}-{args.criterion}")))
    return args

# --- Data: uint8 on the device where it fits, read by worker processes where it does not ----------------------
def generator(device, *key):
    """A random generator that depends on nothing but its key of whole numbers."""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

def shapes(n, seed, size=32):
    """(n, 3, size, size) uint8 images and their (n,) labels: four copies of the class's shape in each image.

    Each copy has a ground, colours, texture, place, scale and tilt of its own: two crops share the shape alone.
    """
    draw, labels = generator("cpu", seed, 0, 9), torch.arange(n) % 8
    axis = (torch.arange(size) + 0.5) / size * 2 - 1  # a copy's quarter, drawn at twice the resolution
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, 1, 1, generator=draw)

    def texture():  # waves between two colours, (n, 3, size, size)
        turn, length, amplitude = uniform(0, math.pi), uniform(2, 15), uniform(-0.15, 0.15, 3)
        return uniform(0, 1, 3) + amplitude * torch.sin(length * (turn.cos() * x + turn.sin() * y))[:, None]

    def quarter():
        scale, tilt = uniform(0.55, 0.95), uniform(-0.3, 0.3)
        u, v = ((axis - uniform(-0.2, 0.2)) / scale for axis in (x, y))
        u, v = tilt.cos() * u + tilt.sin() * v, tilt.cos() * v - tilt.sin() * u
        radius, square = (u * u + v * v).sqrt(), torch.maximum(u.abs(), v.abs())
        inside = torch.stack((
            radius < 0.9, (radius < 1) & (radius > 0.6), square < 0.8, (square < 0.9) & (square > 0.5),
            (v < 0.7) & (v > 2 * u.abs() - 0.9), (torch.minimum(u.abs(), v.abs()) < 0.25) & (square < 1),
            (v.abs() > 0.3) & (square < 0.9), (u.abs() > 0.3) & (square < 0.9)))[labels, torch.arange(n), None]
        return torch.where(inside, texture(), texture()).clamp(0, 1)

    rows = [torch.cat((quarter(), quarter()), 3) for _ in range(2)]
    return (F.avg_pool2d(torch.cat(rows, 2), 2) * 255).round().byte(), labels

class Files(torch.utils.data.Dataset):
    """Images by (index, seed): (two random crops, label, 0), with seed None the centre alone, uint8 (k, 3, S, S).

    A file that cannot be read gives way to the next one that can; the last number is how many were passed over.
    """
    def __init__(self, folder, size, crop):
        if not Path(folder).is_dir():
            fail(f"{folder}: no such folder; there should be {folder}/CLASS/IMAGE, and --data-dir names its parent")
        try:
            found = torchvision.datasets.ImageFolder(folder)
        except FileNotFoundError as error:  # names the classes without images
            fail(f"{folder}: {str(error).splitlines()[0]}")
        self.samples, self.classes, self.size = found.samples, found.classes, size
        self.centre = [transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()]
        self.random = [transforms.RandomResizedCrop(size, (crop or 1, 1)), transforms.PILToTensor()]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        (index, seed), image = key, None
        for skipped in range(len(self)):
            path, label = self.samples[(index + skipped) % len(self)]
            try:
                with Image.open(path) as image:
                    image.draft("RGB", (2 * self.size, 2 * self.size))  # a JPEG may be read at 1/2, 1/4 or 1/8
                    image = image.convert("RGB")
                break
            except Exception:  # a damaged file makes PIL raise about anything
                continue
        recipes = [self.centre] if seed is None else [self.random, self.random]
        with torch.random.fork_rng([]):
            torch.manual_seed((seed or 0) * 1_000_003 + index)
            crops = [functools.reduce(lambda x, f: f(x), recipe, image) for recipe in recipes]
        return torch.stack(crops), label, skipped

    def read_all(self):
        """(images (N, 3, S, S), labels (N,)) of all files; those that cannot be read are named together."""
        images, damaged = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8), []

        def read(i):
            crops, _, skipped = self[i, None]
            images[i] = crops[0]
            damaged.extend([self.samples[i][0]] if skipped else [])

        with ThreadPoolExecutor() as pool:
            list(tqdm(pool.map(read, range(len(self))), "reading images", len(self), leave=False, delay=2))
        if damaged:
            fail(f"{len(damaged)} of {len(self)} images cannot be read: {', '.join(sorted(damaged))}")
        return images, torch.tensor([label for _, label in self.samples])

class Data:
    """Training and test images, in batches of views or as they are.

    What is random depends on (seed, step) alone and is drawn for the whole batch: any number of processes and a
    resumed run see the same images in the same order with the same views.
    """
    def __init__(self, args, device, rank=0, world=1):
        self.args, self.device, self.rank, self.world, self.replaced = args, device, rank, world, 0
        root, crop = Path(args.data_dir), Views(args.image_size, **args.views).crop
        if args.dataset == "shapes":
            sets = shapes(5000, 0), shapes(2000, 1)
        elif args.dataset.startswith("cifar"):
            sets = [self.cifar(root, train) for train in (True, False)]
        else:
            test = next((name for name in ("val", "test") if (root / name).is_dir()), "test")
            sets = [Files(root / name, args.image_size, crop) for name in ("train", test)]
            if sets[0].classes != sets[1].classes:
                fail(f"{root}: train and {test} have different classes")
            if sum(map(len, sets)) * 3 * args.image_size**2 <= RESIDENT_BYTES:
                sets = [files.read_all() for files in sets]
        self.resident = isinstance(sets[0], tuple)
        self.sets = dict(zip(("train", "test"), sets))
        if self.resident:
            self.sets = {k: [t.to(device) for t in pair] for k, pair in self.sets.items()}
        self.size = {k: len(s[0] if self.resident else s) for k, s in self.sets.items()}
        self.classes = int(sets[0][1].max()) + 1 if self.resident else len(sets[0].classes)
        self.views = Views(args.image_size, **(args.views if self.resident else {**args.views, "crop": 0})).to(device)
        self.as_they_are = Views(args.image_size, crop=0, flip=0, jitter=0, grey=0).to(device)
        if getattr(args, "compile", False):
            self.views.apply = torch.compile(self.views.apply, dynamic=False)

    def cifar(self, root, train):
        kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[self.args.dataset]
        try:
            if self.rank:
                dist.barrier()  # behind the first process, which downloads
            found = kind(root, train, download=True)
            if self.rank == 0 and self.world > 1:
                dist.barrier()
        except Exception as error:
            fail(f"{self.args.dataset} is not in {root} and its download failed ({error}); put its archive there, name "
                 "another --data-dir, or try --dataset shapes, which needs no network")
        return torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets)

    def fetch(self, split, keys):
        """Yields (crops, labels) for each (indices, seed) of keys; held images are one crop, the whole."""
        if self.resident:
            images, labels = self.sets[split]
            yield from (([images[index]], labels[index]) for index, _ in keys)
            return
        files, workers = self.sets[split], self.args.workers
        keys = ([(i, seed) for i in index.tolist()] for index, seed in keys)
        for crops, labels, skipped in torch.utils.data.DataLoader(
                files, batch_sampler=keys, num_workers=workers, worker_init_fn=default_signals,
                pin_memory=self.device.type == "cuda", prefetch_factor=4 if workers else None):
            self.replaced += int((skipped > 0).sum())
            yield crops.to(self.device, non_blocking=True).unbind(1), labels.to(self.device, non_blocking=True)

    def batches(self, first, steps, steps_per_epoch):
        """Yields (view a, view b, labels) of this process's share of each step from `first` on."""
        seed, share = self.args.seed, self.args.batch_size // self.world

        def keys():
            for step in range(first, steps):
                epoch, i = divmod(step, steps_per_epoch)
                if i == 0 or step == first:
                    order = torch.randperm(self.size["train"], generator=generator("cpu", seed, epoch, 2))
                    order = order.to(self.device if self.resident else "cpu")
                begin = i * self.args.batch_size + self.rank * share
                yield order[begin:begin + share], seed * 1_000_003 + step

        for step, (crops, labels) in enumerate(self.fetch("train", keys()), first):
            yield *(self.views(crops[-view], generator(self.device, seed, step, view), (self.rank, self.world))
                    for view in (0, 1)), labels

    def plain(self, split, batch=500):
        """Yields (images, labels) of this process's share of "train" or "test", normalised and not augmented."""
        shares = torch.arange(self.rank, self.size[split], self.world).split(batch)
        for crops, labels in self.fetch(split, ((index, None) for index in shares)):
            yield self.as_they_are(crops[0]), labels

# --- Views. Colours are planes (3, B, pixels) in [0, 1], factors (B, 1), the operations torchvision's -----------
def luma(x):
    return (0.2989 * x[0]).add_(x[1], alpha=0.587).add_(x[2], alpha=0.114).expand_as(x)

def blend(x, y, factor):
    return torch.lerp(y, x, factor).clamp_(0, 1)

def adjust_brightness(x, factor):
    return (x * factor).clamp_(0, 1)

def adjust_contrast(x, factor):
    return blend(x, luma(x).mean(2, keepdim=True), factor)

def adjust_saturation(x, factor):
    return blend(x, luma(x), factor)

def adjust_hue(x, turn):
    """Turns the hue by `turn` of a circle; HSV's value and saturation stay."""
    # X = (2 r - max - min) / c,  A = (g - b) / c,  c = max - min: a colour's hue is its place on the edge of the
    # square -1 <= X, A <= 1, so 6 h = sign(A) (3/2 - X (3/2 - |A|)) without a case for each sextant, and back
    # (r, g, b) = min + c clamp(|6 frac(h + (0, 2/3, 1/3)) - 3| - 1, 0, 1)
    r, g, b = x
    high, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = high - low
    inverse = 1 / chroma.clamp_min(1e-12)
    a, x = (g - b).mul_(inverse), (2 * r).sub_(high).sub_(low).mul_(inverse)
    h = (1.5 - x.mul_(1.5 - a.abs())).copysign_(a).mul_(1 / 6).add_(turn + 1)
    thirds = 2 / 3 * torch.arange(3, device=r.device)[:, None, None]
    return (h + thirds).frac_().mul_(6).sub_(3).abs_().sub_(1).clamp_(0, 1).mul_(chroma).add_(low)

def solarise(x, limit):
    """Inverts what is at least 1/2 where limit is 1, nothing where it is 2."""
    return torch.minimum(x, limit - x)

def resampling(start, length, flip, size, out):
    """Weights (B, out, size) that resize [start, start + length) of `size` pixels to `out`, antialiased."""
    # w_oj = max(0, 1 - |j + 1/2 - c_o| / s) / sum_j,  c_o = start + (o + 1/2) length / out,  s = max(1, length / out)
    start, length, flip = (p[:, None, None] for p in (start, length, flip))
    o, j = (torch.arange(n, device=start.device) + 0.5 for n in (out, size))
    centre = start + torch.where(flip, out - o[:, None], o[:, None]) * (length / out)
    weights = (1 - (j - centre).abs_() / (length / out).clamp_min(1)).clamp_min_(0)
    weights = weights * ((j >= start) & (j <= start + length))
    return weights / weights.sum(2, keepdim=True)

def blurring(sigma, size, radius):
    """Weights (B, size, size) of a Gaussian blur of each sample's own sigma, edges reflected."""
    # M_ij = sum of exp(-t^2 / 2 sigma^2), |t| <= radius, over the t = i - k with k reflected to j
    i = torch.arange(size, device=sigma.device)[:, None]
    j, last = i.T, size - 1
    t, real = torch.stack((i - j, i + j, 2 * last - i - j)), torch.stack((i == i + 0 * j, i < j + i, i + j < last + i))
    weights = torch.exp(-0.5 * (t / sigma[:, None, None, None]) ** 2) * (real & (t.abs() <= radius))
    return weights.sum(1) / weights.sum((1, 3))[..., None]

class Views(nn.Module):
    """uint8 images (B, 3, H, W) -> one random view of each, normalised float32 (B, 3, S, S), each drawn on its own.

    Settings, all in [0, 1]: crop, the least share of the area (0: all of it); flip, jitter, grey, blur, solarise,
    probabilities; brightness, contrast, saturation, hue, the jitter's strengths, applied in this order.
    """
    def __init__(self, image_size, crop=0.2, flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2,
                 hue=0.1, grey=0.2, blur=0.0, solarise=0.0):
        super().__init__()
        self.settings = {k: v for k, v in locals().items() if k not in ("self", "image_size", "__class__")}
        if not all(0 <= v <= 1 for v in self.settings.values()):
            raise ValueError(f"the views' settings are in [0, 1], not {self.settings}")
        self.size, self.crop = image_size, crop
        for name, values in dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)).items():  # ImageNet's
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def draw(self, n, height, width, device=None, generator=None):
        """The parameters of n views, a dict of (n,) tensors."""
        s, u = Namespace(**self.settings), iter(torch.rand(15, n, device=device, generator=generator))

        def uniform(low, high):
            return low + (high - low) * next(u)

        # area and aspect ratio as in RandomResizedCrop, but a side that is too long is cut instead of drawn again
        area, ratio = uniform(s.crop or 1, 1) * (height * width), uniform(-1, 1).mul(math.log(4 / 3)).exp()
        h, w = (area / ratio).sqrt().clamp(1, height), (area * ratio).sqrt().clamp(1, width)
        p = dict(height=h, width=w, top=next(u) * (height - h), left=next(u) * (width - w), flip=next(u) < s.flip)
        jitter = next(u) < s.jitter
        for name in ("brightness", "contrast", "saturation"):
            strength = self.settings[name]
            p[name] = torch.where(jitter, uniform(1 - strength, 1 + strength), 1)
        return dict(p, hue=torch.where(jitter, uniform(-s.hue, s.hue), 0), grey=torch.where(next(u) < s.grey, 0.0, 1.0),
                    sigma=torch.where(next(u) < s.blur, uniform(0.1, 2), 1e-3),
                    solarise=torch.where(next(u) < s.solarise, 1.0, 2.0))

    def apply(self, images, p):
        """The views of uint8 images with the parameters p, channels last."""
        (n, _, height, width), size, s = images.shape, self.size, Namespace(**self.settings)
        if s.crop or (height, width) != (size, size):
            if not s.crop:
                p = dict(p, top=0 * p["top"], left=0 * p["left"], height=0 * p["top"] + height, width=0 * p["top"] + width)
            rows = resampling(p["top"], p["height"], torch.zeros_like(p["flip"]), height, size) / 255
            columns = resampling(p["left"], p["width"], p["flip"], width, size)
            x = images.transpose(1, 2).float(memory_format=torch.contiguous_format).view(n, height, -1)
            x = (rows @ x).view(n, -1, width) @ columns.mT  # (B, S, 3 W) -> (B, S 3, S)
            x = x.view(n, size, 3, size).permute(2, 0, 1, 3).reshape(3, n, -1)
        else:
            x = images.transpose(0, 1) / 255
            x = (torch.where(p["flip"][:, None, None], x.flip(3), x) if s.flip else x).flatten(2)
        f = {name: value[:, None] for name, value in p.items()}
        if s.jitter:
            x = adjust_contrast(adjust_brightness(x, f["brightness"]), f["contrast"])
            x = adjust_hue(adjust_saturation(x, f["saturation"]), f["hue"])
        if s.grey:
            x = adjust_saturation(x, f["grey"])
        if s.blur:
            kernel = blurring(p["sigma"], size, radius=max(1, size // 20))
            x = (kernel @ x.view(3, n, size, size) @ kernel.mT).flatten(2)
        if s.solarise:
            x = solarise(x, f["solarise"])
        return ((x - self.mean) / self.std).view(3, n, size, size).transpose(0, 1)

    def forward(self, images, generator=None, share=(0, 1)):
        """share (r, W): the images are part r of W of the batch that the generator draws parameters for."""
        n, (height, width), device = len(images), images.shape[2:], images.device
        p = self.draw(n * share[1], height, width, device, generator)
        p = {name: value[share[0] * n:(share[0] + 1) * n] for name, value in p.items()}
        out = torch.empty(n, 3, self.size, self.size, device=device, memory_format=torch.channels_last)
        step = 64 if device.type == "cpu" else n  # what a CPU core's cache holds
        for i in range(0, n, step):
            out[i:i + step] = self.apply(images[i:i + step], {k: v[i:i + step] for k, v in p.items()})
        return out

# --- Model and optimiser --------------------------------------------------------------------------------------
class Model(nn.Module):
    """Images -> (embeddings, logits of the online probe, which sends no gradient back).

    The encoder is four plain convolutions ("small") or torchvision's ResNet without its classifier. In the
    projector "X-Y-Z", batch norm and ReLU follow each linear layer but the last, which has no bias.
    """
    def __init__(self, arch, image_size, projector, classes):
        super().__init__()
        if arch == "small":
            sizes = (3, 32, 64, 128, 256)
            layers = [(nn.Conv2d(a, b, 3, 1 if a == 3 else 2, 1), nn.ReLU(True)) for a, b in zip(sizes, sizes[1:])]
            self.encoder = nn.Sequential(*sum(layers, ()), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            width = sizes[-1]
        else:
            self.encoder = torchvision.models.get_model(arch, weights=None)
            width, self.encoder.fc = self.encoder.fc.in_features, nn.Identity()
            if image_size <= 64:
                self.encoder.conv1, self.encoder.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
        *hidden, last = sizes = [width, *map(int, projector.split("-"))]
        layers = [(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(True)) for a, b in zip(hidden, hidden[1:])]
        self.projector = nn.Sequential(*sum(layers, ()), nn.Linear(hidden[-1], last, bias=False))
        self.probe = nn.Linear(width, classes)

    def forward(self, images):
        features = self.encoder(images)
        return self.projector(features), self.probe(features.detach())

class LARS(torch.optim.Optimizer):
    """SGD with momentum whose gradients g, in groups with adapt, are scaled to their weights w (arXiv 1708.03888)."""
    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, eta=0.02, adapt=True):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta, adapt=adapt))

    @torch.no_grad()
    def step(self):
        # g <- g + decay w;  lr g <- g min(lr, eta ||w|| / ||g||) if ||w||, ||g|| > 0;  v <- momentum v + g;  w <- w - lr v
        for group in self.param_groups:
            params, lr = [p for p in group["params"] if p.grad is not None], group["lr"]
            grads = torch._foreach_add([p.grad for p in params], params, alpha=group["weight_decay"])
            if group["adapt"]:
                w, g = (torch.stack(torch._foreach_norm(tensors)) for tensors in (params, grads))
                scale = torch.where((w > 0) & (g > 0), (group["eta"] / lr * w / g).clamp(max=1), 1)
                torch._foreach_mul_(grads, list(scale.unbind()))
            momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, grads)
            torch._foreach_add_(params, momenta, alpha=-lr)

def build_optimizers(args, model):
    """The network's optimiser, with biases and norms exempt from decay and adaptation, and the online probe's."""
    params = [*model.encoder.parameters(), *model.projector.parameters()]
    groups = [dict(params=[p for p in params if p.ndim > 1], weight_decay=args.weight_decay),
              dict(params=[p for p in params if p.ndim <= 1], weight_decay=0.0)]
    adamw = functools.partial(torch.optim.AdamW, fused=params[0].device.type != "mps")
    if args.optimizer == "lars":
        groups[1]["adapt"] = False
    lr = args.lr * (1 if args.optimizer == "adamw" else args.batch_size / 256)
    make = dict(lars=LARS, adamw=adamw, sgd=functools.partial(torch.optim.SGD, momentum=0.9))[args.optimizer]
    return make(groups, lr), adamw(model.probe.parameters(), 1e-2, weight_decay=0.0)

def schedule(step, steps, warmup):
    """The learning rate's factor at a step: a linear rise, then half a cosine."""
    rise = round(warmup * steps)
    return (step + 1) / rise if step < rise else 0.5 + 0.5 * math.cos(math.pi * (step - rise) / (steps - rise))

# --- Run ------------------------------------------------------------------------------------------------------
def default_signals(worker=None):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a worker ends with its run
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

def start(args):
    """(device, rank, number of processes, precision): the best device there is, and torchrun's process group."""
    there = [k for k in ("cuda", "mps", "cpu") if k == "cpu" or getattr(torch, k).is_available()]
    kind = there[0] if args.device == "auto" else args.device
    if kind not in there:
        fail(f"--device {kind}: not available here, only {', '.join(there)}")
    if kind == "cpu" and args.precision == "fp16":
        fail("--precision fp16: a CPU gains nothing by it, use bf16 or fp32")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % world or args.batch_size < 2 * world:
        fail(f"--batch-size {args.batch_size} does not divide into {world} parts of at least 2")
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    bf16 = dict(cpu=getattr(torch.cpu, "_is_avx512_bf16_supported", bool), cuda=torch.cuda.is_bf16_supported, mps=bool)
    automatic = "bf16" if bf16[kind]() else "fp16" if kind == "cuda" else "fp32"
    return device, rank, world, automatic if args.precision == "auto" else args.precision

class Clock:
    """Adds up the seconds of a step's parts, with --profile only, as it waits for the device."""
    def __init__(self, device, on):
        self.device, self.on, self.seconds, self.last = device, on, {}, 0

    def __call__(self, part):
        if self.on:
            if self.device.type != "cpu":
                getattr(torch, self.device.type).synchronize()
            self.last, before = time.perf_counter(), self.last
            self.seconds[part] = self.seconds.get(part, 0) + self.last - before

def save(path, write):
    """Writes a file by write(file), whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        fail(f"{path} cannot be written ({error}); what was there before is intact")

def load_checkpoint(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
    except Exception as error:
        fail(f"{path} is damaged ({type(error).__name__}); move it away to begin anew, or choose another --out")

@torch.no_grad()
def probe_accuracy(model, data, autocast):
    """Top-1 of the online probe on the test images, in %."""
    model.eval()
    with autocast():
        right = sum((model(images)[1].argmax(1) == labels).sum() for images, labels in data.plain("test"))
    model.train()
    if data.world > 1:
        dist.all_reduce(right)
    return 100 * right.item() / data.size["test"]

def train(args):
    (device, rank, world, precision), out = start(args), Path(args.out)
    data = Data(args, device, rank, world)
    steps_per_epoch = data.size["train"] // args.batch_size
    steps, done = args.epochs * steps_per_epoch, 0
    if not steps:
        fail(f"--batch-size {args.batch_size}: there are only {data.size['train']} training images")
    torch.manual_seed(args.seed)
    model = Model(args.arch, args.image_size, args.projector, data.classes).to(device, memory_format=torch.channels_last)
    optimizers, scaler = build_optimizers(args, model), torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    autocast = functools.partial(torch.autocast, device.type, enabled=precision != "fp32",
                                 dtype=torch.float16 if precision == "fp16" else torch.bfloat16)
    free = ("epochs", "device", "workers", "compile", "out", "save_every", "profile")  # may change in a run
    settings = {k: v for k, v in vars(args).items() if k not in free}
    checkpoint, log = out / "checkpoint.pt", None
    if saved := None if args.profile else load_checkpoint(checkpoint):
        if other := [f"{k} {saved['settings'].get(k)}, now {v}" for k, v in settings.items() if v != saved["settings"].get(k)]:
            fail(f"{out} holds a run with other settings ({'; '.join(other)}); choose another --out")
        for part, state in zip((model, *optimizers, scaler), saved["state"]):
            part.load_state_dict(state)
        torch.set_rng_state(saved["rng"])
        done = saved["step"]
        if done >= steps:
            print(f"{out}: complete after {done // steps_per_epoch} epochs; more --epochs go on from there")
            return
    if rank == 0 and not args.profile:
        try:
            out.mkdir(parents=True, exist_ok=True)
            log = open(out / "log.jsonl", "ab")
        except OSError as error:
            fail(f"--out {out} cannot be written ({error})")
        log.truncate(saved["log_bytes"] if saved else 0)

    def write(**record):
        if log:
            log.write(json.dumps(record).encode() + b"\n")

    def save_all():
        if log:
            log.flush()
            os.fsync(log.fileno())
            save(out / "encoder.pt", functools.partial(torch.save, model.encoder.state_dict()))
            save(checkpoint, functools.partial(torch.save, dict(
                settings=settings, step=done, log_bytes=log.tell(), rng=torch.get_rng_state(),
                state=[part.state_dict() for part in (model, *optimizers, scaler)])))

    net = model
    if world > 1:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net) if device.type == "cuda" else net
        net = nn.parallel.DistributedDataParallel(net)
    net = torch.compile(net) if args.compile else net
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    stem = ", 3x3 stem without max-pool" if args.arch != "small" and args.image_size <= 64 else ""
    bar = tqdm(total=steps, initial=done, unit="step", disable=rank > 0 or args.profile, mininterval=0.5)
    bar.write(f"{args.criterion} on {data.size['train']} images of {data.classes} classes, {args.arch}{stem}, projector "
              f"{args.projector}, {args.optimizer}, {world} x {device.type} {precision}, {out}", file=sys.stderr)
    clock, rows, seen, top1, watched = Clock(device, args.profile), [], done, math.nan, {}
    since = last_save = time.time()
    criterion, stop = duality.CRITERIA[args.criterion], 0
    for va, vb, labels in data.batches(done, steps, steps_per_epoch):
        clock("views")
        with autocast():
            embeddings, logits = net(torch.cat((va, vb)))
        probe_loss = F.cross_entropy(logits.float(), labels.repeat(2))
        clock("encoder")
        leaf = embeddings.detach().requires_grad_()  # so that the criterion's own gradient can be timed
        za, zb = (duality.gather(z) for z in leaf.chunk(2))
        terms = criterion.terms(za, zb, **args.set)
        loss = sum(terms.values())
        scaler.scale(loss).backward()
        clock("criterion")
        torch.autograd.backward((embeddings, scaler.scale(probe_loss)), (leaf.grad, None))
        clock("encoder")
        for group in optimizers[0].param_groups:
            group["lr"] = schedule(done, steps, args.warmup) * group.setdefault("full_lr", group["lr"])
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        clock("optimiser")
        done += 1
        if args.profile:
            if done == 5:  # the first are no measure
                clock.seconds.clear()
            if done == 55 or done == steps:
                total = sum(clock.seconds.values()) / (done - 5)
                print(f"{args.batch_size / total:.0f} samples/s (two views each), {1e3 * total:.1f} ms a step: "
                      + ", ".join(f"{k} {100 * v / total / (done - 5):.1f} %" for k, v in clock.seconds.items()))
                return
            continue
        right = (logits.argmax(1) == labels.repeat(2)).float().mean()
        rows.append(torch.stack([t.detach() for t in (loss, *terms.values(), right)]))
        epoch_ends = done % steps_per_epoch == 0
        if done % LOOK_EVERY and not epoch_ends and not (signals and world == 1):
            continue

        # Only here does the host wait for the device.
        values, stop = torch.stack(rows), torch.tensor(float(max(signals, default=0)), device=device)
        if world > 1:
            dist.all_reduce(shares := values[:, -1] / world)
            dist.all_reduce(stop, dist.ReduceOp.MAX)
            values[:, -1] = shares
        names, stop = ("loss", *terms, "probe_train"), int(stop)
        if epoch_ends or done % (5 * LOOK_EVERY) == 0:
            watched = duality.diagnose(za)
        for step, row in enumerate(values.tolist(), done - len(rows)):
            record = dict(zip(names, row))
            if bad := [name for name in terms if not math.isfinite(record[name])]:
                if rank == 0:
                    print(f"\ntrain.py: the {bad[0]} term is {record[bad[0]]} at step {step}; {out} keeps its last checkpoint, "
                          "before it; try a lower --lr", file=sys.stderr)
                raise SystemExit(1)
            write(step=step, epoch=step // steps_per_epoch, **record)
        rate, since, seen = (done - seen) * args.batch_size / (time.time() - since), time.time(), done
        write(step=done, samples_per_s=rate, lr=optimizers[0].param_groups[0]["lr"], replaced=data.replaced,
              **{name: value.item() for name, value in watched.items()})
        if epoch_ends:
            top1 = probe_accuracy(model, data, autocast)
            write(epoch=step // steps_per_epoch, probe_test=top1)
        bar.update(done - bar.n)
        bar.set_postfix_str(f"loss {record['loss']:.4g}, probe {100 * record['probe_train']:.1f} % (test {top1:.1f} %), "
                            f"{rate:.0f} samples/s" + f", {data.replaced} damaged" * (data.replaced > 0))
        rows = []
        if stop or done == steps or time.time() - last_save >= args.save_every:
            save_all()
            last_save = time.time()
        if stop:
            bar.close()
            if rank == 0:
                print(f"stopped and saved after step {done} of {steps}; the same command goes on", file=sys.stderr)
            raise SystemExit(128 + stop)
    bar.close()
    if rank == 0:
        print(f"{out}: online probe {top1:.2f} % on the test images; next: python eval.py {out}")

if __name__ == "__main__":
    try:
        train(parse_args())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
