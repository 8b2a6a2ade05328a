"""Pretrain an encoder with any criterion of duality.py.

    python train.py --dataset shapes                             # no download, two minutes on two CPU cores
    python train.py                                              # CIFAR-10, ResNet-18, VICReg
    python train.py --criterion simclr --set temperature=0.15    # any criterion, any keyword of it
    torchrun --nproc-per-node 8 train.py --dataset imagenet --data-dir imagenet --batch-size 1024

The run's folder gets log.jsonl, encoder.pt, and checkpoint.pt, from which the same command goes on.
"""
import argparse, functools, inspect, json, math, os, re, signal, sys, time
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import distributed as dist, nn
from torchvision import transforms
from tqdm import tqdm
import duality

# What a run does where the command line is silent. LARS and SGD scale lr with the batch, given for 256.
DATASETS = {name: dict(arch=arch, epochs=epochs, image_size=size) for name, arch, epochs, size in (
    ("cifar10", "resnet18", 100, 32), ("cifar100", "resnet18", 100, 32), ("imagenet", "resnet50", 100, 224),
    ("folder", "resnet18", 100, 224), ("shapes", "small", 15, 32))}
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

# --- Settings ---------------------------------------------------------------------------------------------
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

def keywords(flag, pairs, function):
    """NAME=VALUE texts as keywords of `function`, refused where it has none of that name and type."""
    known = {k: p.default for k, p in inspect.signature(function).parameters.items() if p.default != p.empty}
    found = {}
    for name, _, value in (pair.partition("=") for pair in pairs):
        try:
            found[name] = type(known[name])(value)
        except (KeyError, ValueError):
            fail(f"{flag} {name}={value}: there is {', '.join(f'{k}={v}' for k, v in known.items())}")
    return found

def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    def group(title, *options):
        add = parser.add_argument_group(title).add_argument
        for flag, kind, default, help in options:
            kind = dict(type=kind) if callable(kind) else dict(choices=kind) if kind else dict(nargs="+")
            add(flag, default=default, help=help, metavar=flag.split("-")[-1].upper(), **kind)
    group(
        "criterion",
        ("--criterion", duality.CRITERIA, "vicreg", f"vicreg (default) or {', '.join(duality.CRITERIA)}"),
        ("--set", None, [], "its hyperparameters, such as temperature=0.15"))
    group(
        "data: shapes, CIFAR, or image files DIR/train/CLASS/IMAGE and DIR/val/... or DIR/test/...",
        ("--dataset", DATASETS, "cifar10", f"cifar10 (default) or {', '.join(DATASETS)}"),
        ("--data-dir", str, None, "default: data; CIFAR is downloaded there"),
        ("--image-size", number(int, 8, 1024), None, "in pixels; default: 32, imagenet and folder 224"),
        ("--views", None, [], "probabilities and strengths of the views, such as grey=0.1 blur=0.5"),
        ("--workers", number(int, 0, 256), min(8, os.cpu_count()), "processes that read image files"))
    group(
        "model, with a 3x3 stem without max-pool for images up to 64 pixels",
        ("--arch", ["small", *RESNETS], None, "small or torchvision's ResNet; default: resnet18, shapes small"),
        ("--projector", widths, None, "layer widths; default: 2048-2048-2048, small 512-512-512"))
    group(
        "optimisation",
        ("--epochs", number(int, 1), None, "default: 100, shapes 15"),
        ("--batch-size", number(int, 2), 256, "of all processes; default: 256"),
        ("--optimizer", ["lars", "sgd", "adamw"], None, "lars, sgd or adamw; default: lars, small adamw"),
        ("--lr", number(float, 1e-9), None, "of batch 256, lars and sgd scale it; default: 0.3, small 0.002"),
        ("--weight-decay", number(float, 0), None, "default: 1e-4, small 0.01"),
        ("--warmup", number(float, 0, 1), 0.05, "share of the steps; default: 0.05"))
    group(
        "running",
        ("--device", ["auto", "cuda", "mps", "cpu"], "auto", "auto (default), cuda, mps or cpu"),
        ("--precision", ["auto", "bf16", "fp16", "fp32"], "auto", "auto (default), bf16, fp16 or fp32"),
        ("--seed", number(int, 0), 0, "default: 0"),
        ("--out", str, None, "the run's folder; default: runs/DATASET-CRITERION"),
        ("--save-every", number(float, 0), 120, "seconds between checkpoints; default: 120"))
    parser.add_argument("--compile", action="store_true", help="torch.compile network and views")
    parser.add_argument("--profile", action="store_true", help="time the parts of 50 steps, save nothing")
    args = parser.parse_args(argv)
    if args.dataset == "shapes" and args.data_dir:
        fail("--data-dir: shapes are made by the program, not read")
    arch = args.arch or DATASETS[args.dataset]["arch"]
    defaults = dict(**DATASETS[args.dataset], **(SMALL if arch == "small" else RESNET), data_dir="data",
                    out=f"runs/{args.dataset}-{args.criterion}")
    vars(args).update({name: value for name, value in defaults.items() if getattr(args, name) is None})
    criterion, width = duality.CRITERIA[args.criterion], int(args.projector.split("-")[-1])
    args.set, args.views = keywords("--set", args.set, criterion), keywords("--views", args.views, Views)
    try:
        Views(8, **args.views), criterion(*torch.randn(2, 4, width), **args.set)
    except ValueError as error:
        fail(error)
    return args

# --- Data: uint8 on the device where it fits, read by worker processes where it does not -------------------
def generator(device, *key):
    """A random generator that depends on nothing but its key of whole numbers."""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

def shapes(n, seed, size=32):
    """(n, 3, size, size) uint8 images and their (n,) labels: four copies of the class's shape in each image.

    Each copy has its own ground, colours, texture, place, scale and tilt: two crops share the shape alone.
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
            (v.abs() > 0.3) & (square < 0.9), (u.abs() > 0.3) & (square < 0.9)))
        return torch.where(inside[labels, torch.arange(n), None], texture(), texture()).clamp(0, 1)
    rows = [torch.cat((quarter(), quarter()), 3) for _ in range(2)]
    return (F.avg_pool2d(torch.cat(rows, 2), 2) * 255).round().byte(), labels

class Files(torchvision.datasets.ImageFolder):
    """Images by (index, seed): (crops (k, 3, S, S) uint8, two random ones or for seed None the centre, label, path).

    A file that cannot be read gives way to the next one that can, and its path is returned; else it is "".
    """
    def __init__(self, folder, size, crop):
        try:
            super().__init__(folder)
        except FileNotFoundError as error:  # no such folder, no class in it, or a class without images
            fail(f"{folder}: {str(error).splitlines()[0]}; --data-dir DIR has DIR/train/CLASS/IMAGE")
        self.size, to_tensor = size, transforms.PILToTensor()
        self.centre = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), to_tensor])
        self.random = transforms.Compose([transforms.RandomResizedCrop(size, (crop or 1, 1)), to_tensor])

    def __getitem__(self, key):
        (index, seed), image = key, Image.new("RGB", (1, 1))
        for i in [*range(index, len(self)), *range(index)]:
            path, label = self.samples[i]
            try:
                with Image.open(path) as file:
                    file.draft("RGB", (2 * self.size, 2 * self.size))  # JPEG can be read at 1/2, 1/4 or 1/8
                    image = file.convert("RGB")
                break
            except Exception:  # a damaged file makes PIL raise about anything
                continue
        damaged = self.samples[index][0] if i != index else ""
        if seed is None:
            return self.centre(image)[None], label, damaged
        with torch.random.fork_rng([]):
            torch.manual_seed(seed * 1_000_003 + index)
            return torch.stack([self.random(image), self.random(image)]), label, damaged

def load(args):
    """Training and test set, each (uint8 images (N, 3, H, W), labels) or Files."""
    root = Path(args.data_dir)
    if args.dataset == "shapes":
        return shapes(5000, 0), shapes(2000, 1)
    if args.dataset in ("cifar10", "cifar100"):
        kind = getattr(torchvision.datasets, args.dataset.upper())
        try:
            sets = [kind(root, train, download=True) for train in (True, False)]
        except Exception as error:
            fail(f"{args.dataset} is not in {root} and its download failed ({error}): put its archive there, "
                 "name another --data-dir, or try --dataset shapes, which needs no network")
        return [(torch.tensor(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets)) for s in sets]
    test = "val" if (root / "val").is_dir() else "test"
    sets = [Files(root / name, args.image_size, Views(8, **args.views).crop) for name in ("train", test)]
    if sets[0].classes != sets[1].classes:
        fail(f"{root}: train and {test} have different classes")
    return sets

class Data:
    """Training and test images, in batches of views or as they are.

    What is random depends on (seed, step) alone and is drawn for the whole batch: any number of processes and
    a resumed run see the same images in the same order with the same views.
    """
    def __init__(self, args, device, rank=0, world=1):
        self.args, self.device, self.rank, self.world, self.damaged = args, device, rank, world, set()
        if rank:
            dist.barrier()  # the first process downloads for all
        sets = load(args)
        if world > 1 and not rank:
            dist.barrier()
        self.sets, self.held = dict(zip(("train", "test"), sets)), not isinstance(sets[0], Files)
        self.size = {split: len(s[1] if self.held else s) for split, s in self.sets.items()}
        if not self.held and sum(self.size.values()) * 3 * args.image_size**2 <= RESIDENT_BYTES:
            keys = {split: [(i, None) for i in torch.arange(n).split(500)] for split, n in self.size.items()}
            read = {split: list(tqdm(self.fetch(split, keys[split]), "reading images", len(keys[split]),
                                     leave=False, delay=2)) for split in keys}
            if self.damaged:
                fail(f"{len(self.damaged)} images cannot be read: {', '.join(sorted(self.damaged))}")
            self.sets = {split: (torch.cat([crops[0] for crops, _ in parts]), torch.cat([y for _, y in parts]))
                         for split, parts in read.items()}
            self.held = True
        if self.held:
            self.sets = {split: [t.to(device) for t in pair] for split, pair in self.sets.items()}
        self.classes = 1 + int(max(self.sets["train"][1] if self.held else sets[0].targets))
        self.views = Views(args.image_size, **args.views).to(device)
        self.views.crop *= self.held  # files are cropped where they are read
        self.unchanged = Views(args.image_size, crop=0, flip=0, jitter=0, grey=0).to(device)
        if args.compile:
            self.views.apply = torch.compile(self.views.apply, dynamic=False)

    def fetch(self, split, keys):
        """Yields (crops, labels) for each (indices, seed) of keys; held images are one crop, the whole."""
        if self.held:
            images, labels = self.sets[split]
            yield from (([images[index]], labels[index]) for index, _ in keys)
            return
        keys = ([(i, seed) for i in index.tolist()] for index, seed in keys)
        for crops, labels, damaged in torch.utils.data.DataLoader(
                self.sets[split], batch_sampler=keys, num_workers=self.args.workers,
                pin_memory=self.device.type == "cuda"):
            self.damaged.update(filter(None, damaged))
            crops, labels = (t.to(self.device, non_blocking=True) for t in (crops, labels))
            yield crops.unbind(1), labels

    def batches(self, first, steps, steps_per_epoch):
        """Yields (view a, view b, labels) of this process's share of each step from `first` on."""
        seed, batch, share = self.args.seed, self.args.batch_size, self.args.batch_size // self.world
        def keys():
            for step in range(first, steps):
                epoch, i = divmod(step, steps_per_epoch)
                if i == 0 or step == first:
                    order = torch.randperm(self.size["train"], generator=generator("cpu", seed, epoch, 2))
                    order = order.to(self.device if self.held else "cpu")
                begin = i * batch + self.rank * share
                yield order[begin:begin + share], seed * 1_000_003 + step
        for step, (crops, labels) in enumerate(self.fetch("train", keys()), first):
            va, vb = (self.views(crops[-view], generator(self.device, seed, step, view), (self.rank, self.world))
                      for view in (0, 1))
            yield va, vb, labels

    def plain(self, split, batch=500):
        """Yields (images, labels) of this process's share of a split, normalised and not augmented."""
        shares = torch.arange(self.rank, self.size[split], self.world).split(batch)
        for crops, labels in self.fetch(split, ((index, None) for index in shares)):
            yield self.unchanged(crops[0]), labels

# --- Views -------------------------------------------------------------------------------------------------
def luma(x):
    return (0.2989 * x[0]).add_(x[1], alpha=0.587).add_(x[2], alpha=0.114).expand_as(x)

def blend(x, y, factor):
    return torch.lerp(y, x, factor).clamp_(0, 1)

def adjust_hue(x, turn):
    """Turns the hue of planes (3, B, pixels) by `turn`, (B, 1), of a circle; HSV's value and saturation stay."""
    # X = (2 r - max - min) / c,  A = (g - b) / c,  c = max - min: a hue is a place on the edge of the square
    # -1 <= X, A <= 1, so 6 h = sign(A) (3/2 - X (3/2 - |A|)) without a case for each sextant, and back
    # (r, g, b) = min + c clamp(|6 frac(h + (0, 2/3, 1/3)) - 3| - 1, 0, 1)
    r, g, b = x
    high, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = high - low
    inverse = 1 / chroma.clamp_min(1e-12)
    a, x = (g - b).mul_(inverse), (2 * r).sub_(high).sub_(low).mul_(inverse)
    h = (1.5 - x.mul_(1.5 - a.abs())).copysign_(a).mul_(1 / 6).add_(turn + 1)
    thirds = 2 / 3 * torch.arange(3, device=r.device)[:, None, None]
    return (h + thirds).frac_().mul_(6).sub_(3).abs_().sub_(1).clamp_(0, 1).mul_(chroma).add_(low)

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
    # M_ij = sum of exp(-t^2 / 2 sigma^2), |t| <= radius, over the t = i - k whose k reflects to j
    i = torch.arange(size, device=sigma.device)[:, None]
    j, last = i.T, size - 1
    t, real = torch.stack((i - j, i + j, i + j - 2 * last)), torch.stack((i >= 0 * j, j > 0 * i, j < last + 0 * i))
    weights = torch.exp(-0.5 * (t / sigma[:, None, None, None]) ** 2) * (real & (t.abs() <= radius))
    return weights.sum(1) / weights.sum((1, 3))[..., None]

class Views(nn.Module):
    """uint8 images (B, 3, H, W) -> a random view of each, normalised float32 (B, 3, S, S), all drawn on their own.

    Settings, in [0, 1]: crop, the least share of the area (0: all of it); flip, jitter, grey, blur, solarise,
    probabilities; brightness, contrast, saturation, hue, the jitter's strengths, applied in this order.
    """
    def __init__(self, image_size, crop=0.2, flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2,
                 hue=0.1, grey=0.2, blur=0.0, solarise=0.0):
        super().__init__()
        self.size, self.crop, self.flip, self.jitter, self.hue = image_size, crop, flip, jitter, hue
        self.grey, self.blur, self.solarise = grey, blur, solarise
        self.strengths = dict(brightness=brightness, contrast=contrast, saturation=saturation)
        if not all(0 <= v <= 1 for v in (crop, flip, jitter, hue, grey, blur, solarise, *self.strengths.values())):
            raise ValueError("the settings of the views are in [0, 1]")
        for name, values in dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)).items():  # ImageNet's
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def draw(self, n, height, width, device=None, generator=None):
        """The parameters of n views, a dict of (n,) tensors."""
        u = iter(torch.rand(15, n, device=device, generator=generator))
        def uniform(low, high):
            return low + (high - low) * next(u)
        # area and aspect ratio as in RandomResizedCrop; a side that is too long is cut, where that draws again
        area, ratio = uniform(self.crop or 1, 1) * height * width, (uniform(-1, 1) * math.log(4 / 3)).exp()
        h, w = (area / ratio).sqrt().clamp(1, height), (area * ratio).sqrt().clamp(1, width)
        if not self.crop:
            h, w = torch.full_like(h, height), torch.full_like(w, width)
        p = dict(height=h, width=w, top=next(u) * (height - h), left=next(u) * (width - w))
        p["flip"], jitter = next(u) < self.flip, next(u) < self.jitter
        for name, strength in self.strengths.items():
            p[name] = torch.where(jitter, uniform(1 - strength, 1 + strength), 1)
        p["hue"] = torch.where(jitter, uniform(-self.hue, self.hue), 0)
        p["grey"] = torch.where(next(u) < self.grey, 0.0, 1.0)
        p["sigma"] = torch.where(next(u) < self.blur, uniform(0.1, 2), 1e-3)
        return dict(p, solarise=torch.where(next(u) < self.solarise, 1.0, 2.0))

    def apply(self, images, p):
        """The views of uint8 images with the parameters p, by torchvision's operations, each sample its own."""
        (n, _, height, width), size = images.shape, self.size
        f = {name: value[:, None] for name, value in p.items()}
        if self.crop or (height, width) != (size, size):
            rows = resampling(p["top"], p["height"], torch.zeros_like(p["flip"]), height, size) / 255
            columns = resampling(p["left"], p["width"], p["flip"], width, size)
            x = images.transpose(1, 2).float(memory_format=torch.contiguous_format).view(n, height, -1)
            x = (rows @ x).view(n, -1, width) @ columns.mT  # (B, S, 3 W) -> (B, S 3, S)
            x = x.view(n, size, 3, size).permute(2, 0, 1, 3).reshape(3, n, -1)  # planes, (3, B, S S)
        else:
            x = images.transpose(0, 1) / 255
            x = (torch.where(p["flip"][:, None, None], x.flip(3), x) if self.flip else x).flatten(2)
        if self.jitter:
            x = (x * f["brightness"]).clamp_(0, 1)
            x = blend(x, luma(x).mean(2, keepdim=True), f["contrast"])
            x = blend(x, luma(x), f["saturation"])
            x = adjust_hue(x, f["hue"])
        if self.grey:
            x = blend(x, luma(x), f["grey"])
        if self.blur:
            kernel = blurring(p["sigma"], size, radius=max(1, size // 20))
            x = (kernel @ x.view(3, n, size, size) @ kernel.mT).flatten(2)
        if self.solarise:
            x = torch.minimum(x, f["solarise"] - x)  # 1 - x where x >= 1/2, or, where solarise is 2, x
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

# --- Model and optimiser -----------------------------------------------------------------------------------
class Model(nn.Module):
    """Images -> (embeddings, logits of the online probe, which sends no gradient back).

    The encoder is four plain convolutions ("small") or torchvision's ResNet without its classifier. In the
    projector "X-Y-Z", batch norm and ReLU follow each linear layer but the last, which has no bias.
    """
    def __init__(self, arch, image_size, projector, classes):
        super().__init__()
        if arch == "small":
            sizes = (3, 32, 64, 128, 256)
            layers = [(nn.Conv2d(a, b, 3, 1 + (a > 3), 1), nn.ReLU(True)) for a, b in zip(sizes, sizes[1:])]
            self.encoder = nn.Sequential(*sum(layers, ()), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            width = sizes[-1]
        else:
            self.encoder = torchvision.models.get_model(arch, weights=None)
            width, self.encoder.fc = self.encoder.fc.in_features, nn.Identity()
            if image_size <= 64:
                self.encoder.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
                self.encoder.maxpool = nn.Identity()
        *hidden, last = [width, *map(int, projector.split("-"))]
        layers = [(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(True)) for a, b in zip(hidden, hidden[1:])]
        self.projector = nn.Sequential(*sum(layers, ()), nn.Linear(hidden[-1], last, bias=False))
        self.probe = nn.Linear(width, classes)

    def forward(self, images):
        features = self.encoder(images)
        return self.projector(features), self.probe(features.detach())

class LARS(torch.optim.Optimizer):
    """SGD with momentum, its gradients, in groups with adapt, scaled to their weights (arXiv 1708.03888)."""
    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, eta=0.02, adapt=True):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta, adapt=adapt))

    @torch.no_grad()
    def step(self):
        # g <- g + decay w;  g <- g min(1, eta ||w|| / (lr ||g||)), unless w or g is 0;  v <- m v + g;  w <- w - lr v
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
    """The network's optimiser, biases and norms exempt from decay and adaptation, and the online probe's."""
    params = [*model.encoder.parameters(), *model.projector.parameters()]
    groups = [dict(params=[p for p in params if p.ndim > 1], weight_decay=args.weight_decay),
              dict(params=[p for p in params if p.ndim <= 1], weight_decay=0.0)]
    if args.optimizer == "lars":
        groups[1]["adapt"] = False
    adamw = functools.partial(torch.optim.AdamW, fused=params[0].device.type != "mps")
    make = dict(lars=LARS, adamw=adamw, sgd=functools.partial(torch.optim.SGD, momentum=0.9))[args.optimizer]
    main = make(groups, args.lr * (1 if args.optimizer == "adamw" else args.batch_size / 256))
    return main, adamw(model.probe.parameters(), 1e-2, weight_decay=0.0)

def schedule(step, steps, warmup):
    """The learning rate's factor at a step: a linear rise, then half a cosine."""
    rise = round(warmup * steps)
    return (step + 1) / rise if step < rise else (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2

def forward_backward(net, criterion, keywords, views, labels, autocast, scaler, clock=lambda part: None):
    """Leaves the gradients of the criterion, over all processes' samples, and of the online probe.

    Returns the terms, the first view's embeddings of all processes, and how many of this one's labels the probe knew.
    """
    with autocast():
        embeddings, logits = net(torch.cat(views))
    labels = labels.repeat(len(views))
    probe_loss = F.cross_entropy(logits.float(), labels)
    clock("encoder")
    leaf = embeddings.detach().requires_grad_()  # so that the criterion can be timed by itself
    gathered = [duality.gather(z) for z in leaf.chunk(len(views))]
    terms = criterion.terms(*gathered, **keywords)
    scaler.scale(sum(terms.values())).backward()
    clock("criterion")
    torch.autograd.backward((embeddings, scaler.scale(probe_loss)), (leaf.grad, None))
    clock("encoder")
    return terms, gathered[0], (logits.argmax(1) == labels).float().mean()

# --- Run ---------------------------------------------------------------------------------------------------
def start(args):
    """(device, rank, number of processes, precision): the best device, and torchrun's process group."""
    there = [k for k in ("cuda", "mps", "cpu") if k == "cpu" or getattr(torch, k).is_available()]
    kind = there[0] if args.device == "auto" else args.device
    if kind not in there:
        fail(f"--device {kind}: not available here, only {', '.join(there)}")
    if kind == "cpu" and args.precision == "fp16":
        fail("--precision fp16: a CPU gains nothing by it, use bf16 or fp32")
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if args.batch_size % world or args.batch_size < 2 * world:
        fail(f"--batch-size {args.batch_size} does not divide into {world} parts of at least 2")
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    fast = {"cpu": getattr(torch.cpu, "_is_avx512_bf16_supported", bool), "cuda": torch.cuda.is_bf16_supported}
    automatic = "bf16" if fast.get(kind, bool)() else "fp16" if kind == "cuda" else "fp32"
    return device, rank, world, automatic if args.precision == "auto" else args.precision

class Clock:
    """Adds up the seconds of a step's parts; only with --profile, as it waits for the device."""
    def __init__(self, device, on):
        self.device, self.on, self.seconds, self.last = device, on, {}, time.perf_counter()

    def __call__(self, part):
        if self.on:
            if self.device.type != "cpu":
                getattr(torch, self.device.type).synchronize()
            before, self.last = self.last, time.perf_counter()
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
        fail(f"{path} is damaged ({type(error).__name__}): move it away to begin anew, or name another --out")

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
    model = Model(args.arch, args.image_size, args.projector, data.classes)
    model.to(device, memory_format=torch.channels_last)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    parts = model, *(optimizers := build_optimizers(args, model)), scaler
    autocast = functools.partial(torch.autocast, device.type, enabled=precision != "fp32",
                                 dtype=torch.float16 if precision == "fp16" else torch.bfloat16)
    free = ("epochs", "device", "workers", "compile", "out", "save_every", "profile")  # may change in a run
    settings, log = {k: v for k, v in vars(args).items() if k not in free}, None
    saved = None if args.profile else load_checkpoint(out / "checkpoint.pt")
    if saved:
        old = saved["settings"]
        if other := [f"{k} was {old.get(k)}, is {v}" for k, v in settings.items() if v != old.get(k)]:
            fail(f"{out} holds a run with other settings ({'; '.join(other)}): name another --out")
        for part, state in zip(parts, saved["state"]):
            part.load_state_dict(state)
        torch.set_rng_state(saved["rng"])
        if (done := saved["step"]) >= steps:
            return print(f"{out} is complete after {done // steps_per_epoch} epochs; more --epochs go on")
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
            save(out / "checkpoint.pt", functools.partial(torch.save, dict(
                settings=settings, step=done, log_bytes=log.tell(), rng=torch.get_rng_state(),
                state=[part.state_dict() for part in parts])))

    net = model
    if world > 1:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net) if device.type == "cuda" else net
        net = nn.parallel.DistributedDataParallel(net)
    net = torch.compile(net) if args.compile else net
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    stem = ", 3x3 stem without max-pool" if args.arch != "small" and args.image_size <= 64 else ""
    if rank == 0:
        print(f"{args.criterion}, {data.size['train']} images of {data.classes} classes, {args.arch}{stem}, projector "
              f"{args.projector}, {args.optimizer}, {world} x {device.type} {precision}, {out}", file=sys.stderr)
    bar = tqdm(total=steps, initial=done, unit="step", disable=rank > 0 or args.profile, mininterval=0.5)
    clock, rows, seen, top1 = Clock(device, args.profile), [], done, math.nan
    since = last_save = time.time()
    for *views, labels in data.batches(done, steps, steps_per_epoch):
        clock("views")
        terms, embeddings, right = forward_backward(
            net, duality.CRITERIA[args.criterion], args.set, views, labels, autocast, scaler, clock)
        for group in optimizers[0].param_groups:
            group["lr"] = schedule(done, steps, args.warmup) * group.setdefault("full_lr", group["lr"])
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        clock("optimiser")
        done += 1
        if args.profile:
            if done == 5:  # the first steps are no measure
                clock.seconds.clear()
            if done == 55 or done == steps:
                total = sum(clock.seconds.values())
                shares = ", ".join(f"{part} {100 * s / total:.1f} %" for part, s in clock.seconds.items())
                return print(f"{args.batch_size * (done - 5) / total:.0f} samples/s, two views each: {shares}")
            continue
        rows.append(torch.stack([t.detach().float() for t in (*terms.values(), right)]))
        epoch_ends = done % steps_per_epoch == 0
        if done % LOOK_EVERY and not epoch_ends and not (signals and world == 1):
            continue
        # Only from here on, once in LOOK_EVERY steps, does the host wait for the device.
        values, stop = torch.stack(rows), torch.tensor(max(signals, default=0), device=device)
        if world > 1:
            dist.all_reduce(right := values[:, -1] / world)
            dist.all_reduce(stop, dist.ReduceOp.MAX)
            values[:, -1], stop = right, int(stop)
        for step, row in enumerate(values.tolist(), done - len(rows)):
            record = dict(zip((*terms, "probe_train"), row))
            if bad := [name for name in terms if not math.isfinite(record[name])]:
                if rank == 0:
                    print(f"\ntrain.py: {bad[0]} is {record[bad[0]]} at step {step}: try a lower --lr; what {out} "
                          "has saved is from before", file=sys.stderr)
                raise SystemExit(1)
            write(step=step, epoch=step // steps_per_epoch, loss=sum(row[:-1]), **record)
        rate = (done - seen) * args.batch_size / (time.time() - since)
        watched = duality.diagnose(embeddings) if epoch_ends or done % (5 * LOOK_EVERY) == 0 else {}
        write(step=step, samples_per_s=rate, lr=group["lr"], damaged=len(data.damaged),
              **{name: value.item() for name, value in watched.items()})
        if epoch_ends:
            top1 = probe_accuracy(model, data, autocast)
            write(epoch=step // steps_per_epoch, probe_test=top1)
        bar.update(done - bar.n)
        bar.set_postfix_str(f"loss {sum(row[:-1]):.4g}, probe {100 * row[-1]:.1f} % (test {top1:.1f} %), {rate:.0f} samples/s"
                            + f", {len(data.damaged)} files damaged" * bool(data.damaged))
        rows, seen, since = [], done, time.time()
        if stop or done == steps or time.time() - last_save >= args.save_every:
            save_all()
            last_save = time.time()
        if stop:
            bar.close()
            if rank == 0:
                print(f"stopped and saved after step {done} of {steps}; the same command goes on", file=sys.stderr)
            raise SystemExit(128 + int(stop))
    bar.close()
    if rank == 0:
        print(f"{out}: online probe {top1:.2f} % on the test images; next: python eval.py {out}")

if __name__ == "__main__":
    try:
        train(parse_args())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
