"""Pretrain an encoder with any criterion of duality.py; the same command again goes on where it stopped.

    python train.py --dataset shapes                             # no download, two minutes on two CPU cores
    python train.py                                              # CIFAR-10, ResNet-18, VICReg
    python train.py --criterion simclr --set temperature=0.15    # any criterion, any keyword of it
    torchrun --nproc-per-node 8 train.py --dataset imagenet --data-dir imagenet --batch-size 1024
"""
import argparse, atexit, ctypes, functools, inspect, io, json, math, os, re, signal, sys, time, zlib
from pathlib import Path
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import distributed as dist, nn
from torchvision.transforms import Compose, PILToTensor, RandomResizedCrop
from tqdm import tqdm
from duality import CRITERIA, diagnose, gather

# What a run does where the command line is silent. LARS and SGD scale lr with the batch, given for 256.
DATASETS = {name: dict(arch=arch, epochs=epochs, image_size=size) for name, arch, epochs, size in (
    ("cifar10", "resnet18", 100, 32), ("cifar100", "resnet18", 100, 32), ("imagenet", "resnet50", 100, 224),
    ("folder", "resnet18", 100, 224), ("shapes", "small", 12, 32))}
SMALL = dict(optimizer="adamw", lr=2e-3, weight_decay=1e-2, projector="512-512-512")
RESNET = dict(optimizer="lars", lr=0.1, weight_decay=1e-4, projector="2048-2048-2048")
RESNETS = [n for n in torchvision.models.list_models(torchvision.models) if re.match("(wide_)?resne(x)?t", n)]
RESIDENT_BYTES = 4 * 2**30  # images that take up to this are held on the device, more are streamed

def say(message):
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(message, sys.stderr)  # above the progress bar

def fail(message, status=2):
    say(f"{Path(sys.argv[0]).name}: {message}")
    raise SystemExit(status)

# --- Settings ---------------------------------------------------------------------------------------------
def number(kind, least, greatest=10**9):
    def number(text):
        if not least <= kind(text) <= greatest:
            raise argparse.ArgumentTypeError(f"{text} is not between {least:g} and {greatest:g}")
        return kind(text)
    return number

def keywords(flag, pairs, function):
    """NAME=VALUE texts as keywords of `function`, refused where it has none of that name and type."""
    parameters, found = inspect.signature(function).parameters.items(), {}
    known = {k: p.default for k, p in parameters if p.default is not p.empty}
    for name, _, value in (pair.partition("=") for pair in pairs):
        try:
            kind = type(known[name])
            found[name] = value if kind is str else number(kind, -10**9)(value)
        except (KeyError, ValueError, argparse.ArgumentTypeError):
            fail(f"{flag} {name}={value}: there is {', '.join(f'{k}={v}' for k, v in known.items())}")
    return found

def parse_args(argv=None):
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.error = lambda message: fail(f"{message} (-h lists the options)")
    several = dict(nargs="+", action="extend")
    def group(title, *options):
        add = cli.add_argument_group(title).add_argument
        for flag, kind, default, help in options:
            kind = dict(type=kind) if callable(kind) else dict(choices=kind) if kind else several
            add(flag, default=default, help=help, metavar=flag.split("-")[-1].upper(), **kind)
        return add
    group("criterion", ("--criterion", CRITERIA, "vicreg", f"default: vicreg; one of {', '.join(CRITERIA)}"),
          ("--set", None, [], "hyperparameters, such as temperature=0.15; a wrong name lists all"))
    group("data: shapes, CIFAR, or image files DIR/train/CLASS/IMAGE and DIR/val/... or DIR/test/...",
          ("--dataset", DATASETS, "cifar10", f"default: cifar10; {', '.join(DATASETS)}"),
          ("--data-dir", str, None, "default: data; CIFAR is downloaded there"),
          ("--image-size", number(int, 8, 1024), None, "in pixels; default: 32, imagenet and folder 224"),
          ("--views", None, [], "probabilities and strengths, such as grey=0.1; a wrong name lists all"),
          ("--workers", number(int, 0, 256), min(8, os.cpu_count()), "that read images; default: at most 8"))
    group("model: small, or torchvision's ResNets, for images up to 64 pixels with a 3x3 stem, no max-pool",
          ("--arch", ["small", *RESNETS], None, "default: resnet18, imagenet resnet50, shapes small"),
          ("--projector", str, None, "layer widths; default: 2048-2048-2048, small 512-512-512"))
    group("optimisation", ("--epochs", number(int, 1), None, "default: 100, shapes 12"),
          ("--batch-size", number(int, 2), 256, "of all processes; default: 256"),
          ("--optimizer", ["lars", "sgd", "adamw"], None, "lars, sgd or adamw; default: lars, small adamw"),
          ("--lr", number(float, 1e-9), None, "for batch 256, scaled unless adamw; default: 0.1, small 2e-3"),
          ("--weight-decay", number(float, 0), None, "default: 1e-4, small 0.01"),
          ("--warmup", number(float, 0, 1), 0.05, "share of the steps; default: 0.05"))
    add = group("running", ("--device", ["auto", "cuda", "mps", "cpu"], "auto", "auto, cuda, mps or cpu"),
          ("--precision", ["auto", "bf16", "fp16", "fp32"], "auto", "auto, bf16, fp16 or fp32"),
          ("--seed", number(int, 0), 0, "default: 0"), ("--out", str, None, "default: runs/DATA-CRITERION"),
          ("--save-every", number(float, 0), 120, "seconds between checkpoints; default: 120"))
    add("--compile", action="store_true", help="torch.compile network, criterion and views")
    add("--profile", action="store_true", help="time the parts of 50 steps, save nothing")
    args = cli.parse_args(argv)
    if args.dataset == "shapes" and args.data_dir:
        fail("--data-dir: shapes are made by the program, not read")
    arch = args.arch or DATASETS[args.dataset]["arch"]
    defaults = dict(**DATASETS[args.dataset], **(SMALL if arch == "small" else RESNET), data_dir="data",
                    out=f"runs/{args.dataset}-{args.criterion}")
    vars(args).update({name: value for name, value in defaults.items() if getattr(args, name) is None})
    if not re.fullmatch(r"[1-9]\d{0,4}(-[1-9]\d{0,4})*", args.projector):
        fail(f"--projector {args.projector}: no list of layer widths such as 2048-2048-512")
    criterion = CRITERIA[args.criterion]
    args.set, args.views = keywords("--set", args.set, criterion), keywords("--views", args.views, Views)
    try:  # values out of range are found here, not after the data are read
        Views(8, **args.views), criterion(*torch.randn(2, 4, int(args.projector.split("-")[-1])), **args.set)
    except (ArithmeticError, ValueError) as error:
        fail(f"--set or --views: {error}")
    return args

# --- Data: uint8 on the device where it fits, read by worker processes where it does not -------------------
def generator(device, *key):
    """A random generator that depends on nothing but its key of whole numbers."""
    return torch.Generator(device).manual_seed(zlib.crc32(repr(key).encode()))

def shapes(n, seed, size=32):
    """uint8 images (n, 3, size, size), labels (n,): four copies of a shape, all else of them random."""
    draw, labels = generator("cpu", seed, 0, 9), torch.arange(n) % 8
    axis = (torch.arange(2 * size) + 0.5) / size * 2 - 2  # twice the resolution, a copy in each quarter
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, 1, 1, generator=draw)
    def texture(low, high):  # waves about a colour, (n, 3, 2 size, 2 size)
        turn, length, amplitude = uniform(0, math.pi), uniform(2, 15), uniform(-0.2, 0.2, 3)
        return uniform(low, high, 3) + amplitude * (length * (turn.cos() * x + turn.sin() * y)).sin()[:, None]
    images = texture(0, 0.5)
    for row, column in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
        scale, tilt = uniform(0.4, 0.95), uniform(-0.5, 0.5)
        u, v = (x - column - uniform(-0.4, 0.4)) / scale, (y - row - uniform(-0.4, 0.4)) / scale
        u, v = tilt.cos() * u + tilt.sin() * v, tilt.cos() * v - tilt.sin() * u
        radius, square = (u * u + v * v).sqrt(), torch.maximum(u.abs(), v.abs())
        inside = torch.stack((
            radius < 0.9, (radius < 1) & (radius > 0.6), square < 0.8, (square < 0.9) & (square > 0.5),
            (v < 0.7) & (v > 2 * u.abs() - 0.9), (torch.minimum(u.abs(), v.abs()) < 0.25) & (square < 1),
            (v.abs() > 0.3) & (square < 0.9), (u.abs() > 0.3) & (square < 0.9)))
        images = torch.where(inside[labels, torch.arange(n), None], texture(0.5, 1), images)
    images = torch.where(uniform(0, 1, 1) < 0.5, images, 1 - images)
    return (F.avg_pool2d(images.clamp(0, 1), 2) * 255).round().byte(), labels

class Files(torchvision.datasets.ImageFolder):
    """By (index, seed): uint8 crops (k, 3, S, S), two random ones or, seed None, the centre; label; path of a
    file that cannot be read and gave way to the next one that can, or ""."""
    def __init__(self, folder, size, least_area):
        try:
            super().__init__(folder)
        except FileNotFoundError as error:  # no such folder, no class in it, or a class without images
            fail(f"{folder}: {str(error).splitlines()[0]}; --data-dir DIR has DIR/train/CLASS/IMAGE")
        fit = functools.partial(ImageOps.fit, size=(size, size), method=Image.Resampling.BILINEAR)
        self.size, self.centre = size, Compose([fit, PILToTensor()])
        self.random = Compose([RandomResizedCrop(size, (least_area or 1, 1)), PILToTensor()])
    def __getitem__(self, key):
        (index, seed), image = key, Image.new("RGB", (1, 1))
        for tries in range(len(self) + 1):
            path, label = self.samples[(index + tries) % len(self)]
            try:
                with Image.open(path) as file:
                    file.draft("RGB", (2 * self.size, 2 * self.size))  # JPEG can be read at 1/2, 1/4 or 1/8
                    image = file.convert("RGB")
                break
            except Exception:  # a damaged file makes PIL raise about anything
                continue
        if seed is not None:
            torch.default_generator.manual_seed((seed * 1_000_003 + index) % 2**63)  # nothing else uses it
        crops = [self.centre(image)] if seed is None else [self.random(image), self.random(image)]
        return torch.stack(crops), label, self.samples[index][0] if tries else ""
    def read_all(self, workers):
        """(images (N, 3, S, S), labels (N,)) of all files; those that cannot be read are named together."""
        keys = [(i, None) for i in range(len(self))]
        loader = torch.utils.data.DataLoader(self, batch_size=500, sampler=keys, num_workers=workers)
        crops, labels, damaged = zip(*tqdm(loader, "reading images", leave=False, delay=2, disable=None))
        if damaged := list(filter(None, sum(map(list, damaged), []))):
            fail(f"{len(damaged)} of {len(self)} images cannot be read: {', '.join(damaged)}")
        return torch.cat(crops)[:, 0], torch.cat(labels)

def load(args):
    """Training and test set, each (uint8 images (N, 3, H, W) or, where they are too much, Files; labels)."""
    root = Path(args.data_dir)
    if args.dataset == "shapes":
        sets = [[shapes(500, seed) for seed in seeds] for seeds in (range(10), range(10, 14))]
        return [[torch.cat(column) for column in zip(*parts)] for parts in sets]
    if args.dataset in ("cifar10", "cifar100"):
        kind = getattr(torchvision.datasets, args.dataset.upper())
        try:
            sets = [kind(root, train, download=True) for train in (True, False)]
        except Exception as error:
            fail(f"{args.dataset} is not in {root} and its download failed ({error}): put its archive there, "
                 "name another --data-dir, or try --dataset shapes, which needs no network")
        return [(torch.tensor(s.data.transpose(0, 3, 1, 2)), torch.tensor(s.targets)) for s in sets]
    test = "val" if (root / "val").is_dir() else "test"
    sets = [Files(root / name, args.image_size, Views(8, **args.views).crop) for name in ("train", test)]
    if sets[0].classes != sets[1].classes:
        fail(f"{root}: train and {test} have different classes")
    if sum(map(len, sets)) * 3 * args.image_size**2 <= RESIDENT_BYTES:
        return [files.read_all(args.workers) for files in sets]
    return [(files, torch.tensor(files.targets)) for files in sets]

def on_signals(handler, worker=None):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)

class Data:
    """Training and test images, in batches of views or as they are. What is random depends on (seed, step)
    and is drawn for the whole batch: any number of processes, and a resumed run, see the same views."""
    def __init__(self, args, device, rank=0, world=1):
        self.args, self.device, self.rank, self.world, self.damaged = args, device, rank, world, set()
        if rank:
            dist.barrier()  # the first process downloads for all
        self.sets = dict(zip(("train", "test"), load(args)))
        if world > 1 and not rank:
            dist.barrier()
        self.size = {split: len(labels) for split, (_, labels) in self.sets.items()}
        self.classes = 1 + int(self.sets["train"][1].max())
        self.views = Views(args.image_size, **args.views).to(device)
        self.unchanged = Views(args.image_size, crop=0, flip=0, jitter=0, grey=0).to(device)
        if isinstance(self.sets["train"][0], Files):
            self.views.crop = 0  # files are cropped where they are read
        else:
            self.sets = {split: [t.to(device) for t in pair] for split, pair in self.sets.items()}
        if args.compile:
            self.views.apply = torch.compile(self.views.apply, dynamic=False)
    def fetch(self, split, keys):
        """Iterates (crops, labels) for each (indices, seed) of keys; held images are one crop, the whole."""
        images, labels = self.sets[split]
        if torch.is_tensor(images):
            return (([images[index]], labels[index]) for index, _ in keys)
        move = functools.partial(torch.Tensor.to, device=self.device, non_blocking=True)
        def stream():
            for crops, labels, damaged in torch.utils.data.DataLoader(
                    images, batch_sampler=([(i, seed) for i in index.tolist()] for index, seed in keys),
                    num_workers=self.args.workers, pin_memory=self.device.type == "cuda",
                    worker_init_fn=functools.partial(on_signals, signal.SIG_IGN)):  # a run ends them itself
                self.damaged.update(filter(None, damaged))
                yield move(crops).unbind(1), move(labels)
        return stream()
    def batches(self, first, steps, steps_per_epoch):
        """Yields (view a, view b, labels) of this process's share of each step from `first` on."""
        seed, batch, share = self.args.seed, self.args.batch_size, (self.rank, self.world)
        def keys():
            for step in range(first, steps):
                epoch, i = divmod(step, steps_per_epoch)
                if i == 0 or step == first:
                    order = torch.randperm(self.size["train"], generator=generator("cpu", seed, epoch, 2))
                    order = order.to(self.sets["train"][1].device)
                yield order[i * batch:][:batch].chunk(self.world)[self.rank], seed * 1_000_003 + step
        for step, (crops, labels) in enumerate(self.fetch("train", keys()), first):
            draws = (generator(self.device, seed, step, view) for view in (0, 1))
            yield *(self.views(crops[-view], draw, share) for view, draw in enumerate(draws)), labels
    def plain(self, split, batch=500):
        """Yields (images, labels) of this process's share of a split, normalised and not augmented."""
        shares = torch.arange(self.rank, self.size[split], self.world).split(batch)
        for crops, labels in self.fetch(split, ((index, None) for index in shares)):
            yield self.unchanged(crops[0]), labels

# --- Views -------------------------------------------------------------------------------------------------
def luma(x):
    return (0.2989 * x[0]).add_(x[1], alpha=0.587).add_(x[2], alpha=0.114)

def adjust_hue(planes, turn):
    """Turns the hue of planes (3, B, pixels), in place, by turn (B, 1) of a circle, as HSV has it."""
    # X = (max + min - 2 r) / c,  A = (g - b) / c,  c = max - min: a hue is a place on the edge of the square
    # -1 <= X, A <= 1, so 6 h = sign(A) (3/2 + X (3/2 - |A|)) without a case for each sextant, and back
    # r = min - c + 6 c clamp(|h - 1/2|, 1/6, 1/3),  g, b = max + c - 6 c clamp(|h - (1/3, 2/3)|, 1/6, 1/3)
    (r, g, b), high, low = planes, planes.amax(0), planes.amin(0)
    chroma = high - low
    inverse = chroma.clamp_min(1e-12).reciprocal_()
    a, x = (g - b).mul_(inverse), (high + low).sub_(r, alpha=2).mul_(inverse)
    h = x.mul_(a.abs().neg_().add_(1.5)).add_(1.5).copysign_(a).mul_(1 / 6).add_(turn + 1).frac_()
    low, high = low.sub_(chroma), high.add_(chroma)
    for plane, base, at, six in ((r, low, 1 / 2, 6), (g, high, 1 / 3, -6), (b, high, 2 / 3, -6)):
        torch.addcmul(base, torch.sub(h, at, out=a).abs_().clamp_(1 / 6, 1 / 3), chroma, value=six, out=plane)

def resampling(start, length, size, out):
    """Weights (..., out, size) of the antialiased resize of [start, start + length), (..., 1); see draw."""
    # w_oj ~ max(0, s - |j + 1/2 - c_o|),  c_o = start + (o + 1/2) r,  r = length / out,  s = max(1, |r|)
    o, j = (torch.arange(n, device=start.device) + 0.5 for n in (out, size))
    start, half, ratio = start[..., None], length[..., None] / 2, length[..., None] / out
    j = j.masked_fill((j - (start + half)).abs_() > half.abs(), math.inf)  # (..., 1, size)
    distances = (j - (start + o[:, None] * ratio)).abs_()
    weights = (ratio.abs_().clamp_min_(1) - distances).clamp_min_(0)
    return weights.mul_(1 / weights.sum(-1, keepdim=True))

def blurring(sigma, size, radius):
    """Weights (B, size, size) of a Gaussian blur of each sample's own sigma (B, 1), edges reflected."""
    # M_ij = sum of exp(-t^2 / 2 sigma^2) / sum_t, |t| <= radius, over the t with i + t reflected to j
    i, t = (torch.arange(low, high, device=sigma.device) for low, high in ((0, size), (-radius, radius + 1)))
    j = size - 1 - (size - 1 - (i[:, None] + t).abs()).abs()
    weights = (-0.5 * (t / sigma) ** 2).softmax(1)[:, None].expand(-1, size, -1)
    return weights.new_zeros(len(sigma), size, size).scatter_add_(2, j.expand_as(weights), weights)

class Views(nn.Module):
    """uint8 images (B, 3, H, W) -> a random view of each, drawn on its own, normalised float32 (B, 3, S, S).

    In [0, 1]: crop, the least share of the area (0: all); flip, jitter, grey, blur, solarise, probabilities;
    brightness, contrast, saturation, hue, the jitter's strengths, in this order."""
    def __init__(self, image_size, crop=0.2, flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4,
                 saturation=0.2, hue=0.1, grey=0.2, blur=0.0, solarise=0.0):
        super().__init__()
        settings = {k: v for k, v in locals().items() if k not in ("self", "image_size", "__class__")}
        if wrong := {name: value for name, value in settings.items() if not 0 <= value <= 1}:
            raise ValueError(f"the views' settings are in [0, 1], not {wrong}")
        vars(self).update(settings, size=image_size)
        for name, values in dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)).items():  # ImageNet's
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
    def draw(self, n, height, width, device=None, generator=None):
        """The parameters of n views, a dict of (n, 1) tensors; a flipped view's width is negative."""
        u = iter(torch.rand(15, n, 1, device=device, generator=generator))
        def uniform(low, high):
            return low + (high - low) * next(u)
        # area and aspect ratio as in RandomResizedCrop, but a side too long is cut, where that draws again
        area, ratio = uniform(self.crop or 1, 1) * height * width, (uniform(-1, 1) * math.log(4 / 3)).exp()
        h, w = (area / ratio).sqrt().clamp(1, height), (area * ratio).sqrt().clamp(1, width)
        if not self.crop:
            h, w = torch.full_like(h, height), torch.full_like(w, width)
        top, left, flip = next(u) * (height - h), next(u) * (width - w), next(u) < self.flip
        p = dict(top=top, height=h, left=torch.where(flip, left + w, left), width=torch.where(flip, -w, w))
        jitter = next(u) < self.jitter
        for name, neutral in dict(brightness=1, contrast=1, saturation=1, hue=0).items():
            p[name] = torch.where(jitter, neutral + getattr(self, name) * uniform(-1, 1), neutral)
        p["grey"] = torch.where(next(u) < self.grey, 0.0, 1.0)
        p["sigma"] = torch.where(next(u) < self.blur, uniform(0.1, 2), 1e-3)
        return dict(p, solarise=torch.where(next(u) < self.solarise, 1.0, 2.0))
    def apply(self, images, p):
        """The views of uint8 images with the parameters p, each operation as torchvision defines it."""
        (n, _, height, width), size = images.shape, self.size
        box = torch.stack([p[name] for name in ("top", "left", "height", "width")])
        rows, columns = resampling(box[:2], box[2:], max(height, width), size)
        rows = rows.mul_(p["brightness"][..., None] / 255)[..., :height]
        images = (images.float().reshape(n, -1, width) @ columns[..., :width].mT).view(n, 3, height, size)
        x = images.new_empty(3, n, size * size)  # planes
        for plane, image in zip(x.view(3, n, size, size), images.unbind(1)):
            torch.bmm(rows, image, out=plane)
        if self.jitter:
            mean = luma(x.clamp_(0, 1).mean(2, keepdim=True))
            x = x.mul_(p["contrast"]).add_((1 - p["contrast"]) * mean).clamp_(0, 1)
            x = x.lerp_(luma(x).expand_as(x), 1 - p["saturation"]).clamp_(0, 1)
            adjust_hue(x, p["hue"])
        if self.grey:
            x = x.lerp_(luma(x).expand_as(x), 1 - p["grey"])
        if self.blur:
            kernel = blurring(p["sigma"], size, radius=max(1, size // 20))
            x = (kernel @ x.view(3, n, size, size) @ kernel.mT).flatten(2)
        if self.solarise:
            x = torch.minimum(x, p["solarise"] - x)  # 1 - x where x >= 1/2, or, where solarise is 2, x
        return x.sub_(self.mean).mul_(1 / self.std).view(3, n, size, size).transpose(0, 1)
    def forward(self, images, generator=None, share=(0, 1)):
        """share (r, W): the images are part r of W of the batch that the generator draws parameters for."""
        n, step = len(images), 64 if images.is_cpu else len(images)  # 64 are what a CPU core's cache holds
        p = self.draw(n * share[1], *images.shape[2:], images.device, generator)
        values = torch.stack(list(p.values()))[:, share[0] * n:][:, :n]
        out = torch.empty(n, 3, self.size, self.size, device=images.device, memory_format=torch.channels_last)
        with torch.autocast(images.device.type, enabled=False):
            for views, part, v in zip(out.split(step), images.split(step), values.split(step, 1)):
                views.copy_(self.apply(part, dict(zip(p, v))))
        return out

# --- Model and optimiser -----------------------------------------------------------------------------------
class Model(nn.Module):
    """Images -> (embeddings, logits of the online probe, which sends no gradient back). The encoder is small
    or torchvision's; in the projector batch norm and ReLU follow each layer but the last, without bias."""
    def __init__(self, arch, image_size, projector, classes):
        super().__init__()
        if arch == "small":
            sizes = (3, 32, 64, 128, width := 256)
            layers = [(nn.Conv2d(a, b, 3, 1 + (a > 3), 1), nn.ReLU(True)) for a, b in zip(sizes, sizes[1:])]
            self.encoder = nn.Sequential(*sum(layers, ()), nn.AdaptiveAvgPool2d(1), nn.Flatten())
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
    """SGD with momentum; with adapt, gradients as long as eta times their weights (arXiv 1708.03888)."""
    def __init__(self, params, lr, weight_decay=0.0, eta=0.02, adapt=True):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, eta=eta, adapt=adapt))
        self.state |= {p: dict(momentum=torch.zeros_like(p)) for g in self.param_groups for p in g["params"]}
    @torch.no_grad()
    def step(self):
        # g <- g + decay w;  g <- g eta |w| / |g|, if |w|, |g| > 0;  v <- 0.9 v + g;  w <- w - lr v
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = torch._foreach_add([p.grad for p in params], params, alpha=group["weight_decay"])
            if group["adapt"]:
                w, g = (torch.stack(torch._foreach_norm(tensors)) for tensors in (params, grads))
                torch._foreach_mul_(grads, torch.where((w > 0) & (g > 0), group["eta"] * w / g, 1).unbind())
            momenta = [self.state[p]["momentum"] for p in params]
            torch._foreach_mul_(momenta, 0.9)
            torch._foreach_add_(momenta, grads)
            torch._foreach_add_(params, momenta, alpha=-group["lr"])

def build_optimizers(args, model):
    """The network's optimiser, biases and norms exempt from decay and adaptation, and the online probe's."""
    params = [*model.encoder.parameters(), *model.projector.parameters()]
    groups = [dict(params=[p for p in params if p.ndim > 1], weight_decay=args.weight_decay),
              dict(params=[p for p in params if p.ndim <= 1], weight_decay=0.0, adapt=False)]
    adamw = functools.partial(torch.optim.AdamW, fused=params[0].device.type != "mps")
    make = dict(lars=LARS, adamw=adamw, sgd=functools.partial(torch.optim.SGD, momentum=0.9))[args.optimizer]
    main = make(groups, args.lr * (1 if args.optimizer == "adamw" else args.batch_size / 256))
    return main, adamw(model.probe.parameters(), 1e-2, weight_decay=0.0)

def schedule(step, steps, warmup):
    """The learning rate's factor at a step: a linear rise, then half a cosine."""
    rise = round(warmup * steps)
    return (step + 1) / rise if step < rise else (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2

def distribute(net, device):
    if not dist.is_initialized():
        return net
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net) if device.type == "cuda" else net
    return nn.parallel.DistributedDataParallel(net)

def forward_backward(net, criterion, keywords, views, labels, autocast, scaler, clock=lambda part: None):
    """Makes a step's gradients; returns terms, all processes' embeddings of view a, the probe's accuracy."""
    with autocast():
        embeddings, logits = net(torch.cat(views))
    labels = labels.repeat(len(views))
    clock("encoder")
    leaf = embeddings.detach().requires_grad_()  # so that the criterion can be timed by itself
    gathered = [gather(z) for z in leaf.chunk(len(views))]
    terms = criterion(*gathered, **keywords)
    scaler.scale(sum(terms.values())).backward()
    clock("criterion")
    probe_loss = scaler.scale(F.cross_entropy(logits.float(), labels))
    torch.autograd.backward((embeddings, probe_loss), (leaf.grad, None))
    clock("encoder")
    return terms, gathered[0], (logits.argmax(1) == labels).float().mean()

# --- Run ---------------------------------------------------------------------------------------------------
def start(args):
    """(device, rank, number of processes, precision): the best device, and torchrun's process group."""
    here = [k for k, v in dict(cuda=torch.cuda, mps=torch.backends.mps).items() if v.is_available()] + ["cpu"]
    kind = here[0] if args.device == "auto" else args.device
    if kind not in here:
        fail(f"--device {kind}: not available here, only {', '.join(here)}")
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if args.batch_size % world or args.batch_size < 2 * world:
        fail(f"--batch-size {args.batch_size} does not divide into {world} parts of at least 2")
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # shapes are the same at every step
    if kind == "cpu" and sys.platform == "linux":  # asking the system for memory anew takes 1/5 of the time
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**31 - 1), libc.mallopt(-3, 2**25)  # trim at 2 GiB, all up to 32 MiB from the heap
    if world > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group), atexit.register(time.sleep, 0.1)  # else may hang
    fast = dict(cpu=getattr(torch.cpu, "_is_avx512_bf16_supported", bool), cuda=torch.cuda.is_bf16_supported)
    best = "bf16" if fast.get(kind, bool)() else "fp16" if kind == "cuda" else "fp32"
    return device, rank, world, best if args.precision == "auto" else args.precision

def save(path, content):
    """Writes a file, by torch.save or bytes as they are, whole or not at all."""
    part, buffer = path.with_name(path.name + ".part"), io.BytesIO()
    buffer.write(content) if isinstance(content, bytes) else torch.save(content, buffer)
    try:
        with open(part, "wb") as file:
            file.write(buffer.getvalue())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

def load_checkpoint(path):
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
        return saved if saved is None else {k: saved[k] for k in ("settings", "step", "log_bytes", "state")}
    except Exception as error:
        fail(f"{path} is damaged ({type(error).__name__}): move it away or name another --out")

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
    steps, done = min(args.epochs * steps_per_epoch, 55 if args.profile else math.inf), 0
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
    settings = {k: v for k, v in vars(args).items() if k not in free}
    saved = None if args.profile else load_checkpoint(out / "checkpoint.pt")
    if saved:
        old = saved["settings"]
        if other := [f"{k} was {old.get(k)}, is {v}" for k, v in settings.items() if v != old.get(k)]:
            fail(f"{out} holds a run with other settings ({'; '.join(other)}): name another --out")
        for part, state in zip(parts, saved["state"]):
            part.load_state_dict(state)
        if (done := saved["step"]) >= steps:
            return say(f"{out} is complete after {done // steps_per_epoch} epochs; more --epochs go on")
    writes, log = rank == 0 and not args.profile, open(os.devnull, "wb")
    if writes:
        out.mkdir(parents=True, exist_ok=True)
        log = open(out / "log.jsonl", "ab", buffering=0)
        log.truncate(min(saved["log_bytes"], log.tell()) if saved else 0)
    def write(**record):
        log.write(json.dumps(record).encode() + b"\n")
    def save_all():
        if not all(weight.isfinite().all() for weight in model.parameters()):
            fail(f"the weights are not finite after step {done - 1}; {out} keeps what it saved before", 1)
        os.fsync(log.fileno())
        save(out / "encoder.pt", model.encoder.state_dict())
        save(out / "checkpoint.pt", dict(settings=settings, step=done, log_bytes=log.tell(),
                                         state=[part.state_dict() for part in parts]))
    def clock(part):
        nonlocal last
        if args.profile:  # only then does it wait for the device
            getattr(torch, device.type).synchronize()
        before, last = last, time.perf_counter()
        seconds[part] = seconds.get(part, 0) + last - before
    net, criterion = distribute(model, device), CRITERIA[args.criterion].terms
    if args.compile:
        net, criterion = torch.compile(net), torch.compile(criterion)
    rows, test, seconds, signals = [], "", {}, []
    on_signals(lambda number, frame: signals.append(number))
    stem = ", 3x3 stem without max-pool" * (args.arch != "small" and args.image_size <= 64)
    say(f"{args.criterion}, {data.size['train']} images of {data.classes} classes, {args.arch}{stem}, "
        f"projector {args.projector}, {args.optimizer}, {world} x {device.type} {precision}, {out}")
    bar = tqdm(total=steps, initial=done, unit="step", disable=rank > 0 or args.profile, mininterval=0.5)
    last = looked = last_save = time.perf_counter()
    for *views, labels in data.batches(done, steps, steps_per_epoch):
        clock("views")
        terms, embeddings, right = forward_backward(
            net, criterion, args.set, views, labels, autocast, scaler, clock)
        for group in optimizers[0].param_groups:
            group["lr"] = schedule(done, steps, args.warmup) * group.setdefault("full_lr", group["lr"])
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        clock("optimiser")
        done += 1
        if args.profile:
            if done == 5 < steps:
                seconds.clear()  # the first steps are no measure
            continue
        rows.append(torch.stack([t.detach().float() for t in (*terms.values(), right)]))
        epoch_ends = done % steps_per_epoch == 0
        if done % 20 and not epoch_ends and not (signals and world == 1):
            continue
        # Only from here on, every 20 steps, does the host wait for the device.
        values, stop = torch.stack(rows), torch.tensor(max(signals, default=0), device=device)
        if world > 1:
            dist.all_reduce(right := values[:, -1] / world)
            dist.all_reduce(stop, dist.ReduceOp.MAX)
            values[:, -1], stop = right, int(stop)
        for step, row in enumerate(values.tolist(), done - len(rows)):
            record = dict(zip((*terms, "probe_train"), row))
            if bad := [name for name in terms if not math.isfinite(record[name])]:
                fail(f"{bad[0]} is {record[bad[0]]} at step {step}; {out} keeps what it saved before", 1)
            write(step=step, epoch=step // steps_per_epoch, loss=sum(row[:-1]), **record)
        rate = len(rows) * args.batch_size / (time.perf_counter() - looked)
        seen = {k: v.item() for k, v in diagnose(embeddings).items()} if epoch_ends or done % 100 == 0 else {}
        write(step=step, samples_per_s=rate, time=seconds, lr=group["lr"], damaged=len(data.damaged), **seen)
        if epoch_ends:
            write(epoch=step // steps_per_epoch, probe_test=(top1 := probe_accuracy(model, data, autocast)))
            test = f" (test {top1:.1f} %)"
        bar.update(done - bar.n)
        bar.set_postfix_str(f"loss {sum(row[:-1]):.4g}, probe {100 * row[-1]:.1f} %{test}, "
                            f"{rate:.0f} samples/s" + f", {len(data.damaged)} damaged" * bool(data.damaged))
        if writes and (stop or done == steps or time.perf_counter() - last_save >= args.save_every):
            save_all()
            last_save = time.perf_counter()
        rows, seconds, last = [], {}, (looked := time.perf_counter())
        if stop:
            fail(f"stopped and saved after step {done} of {steps}; the same command goes on", 128 + int(stop))
    bar.close()
    if args.profile:
        total = sum(seconds.values()) / (done - 5 * (done > 5))
        shares = ", ".join(f"{part} {100 * s / sum(seconds.values()):.1f} %" for part, s in seconds.items())
        return say(f"{args.batch_size / total:.0f} samples/s, two views each: {shares}")
    say(f"{out}: online probe {top1:.2f} % on the test images; next: python eval.py {out}")

def main(argv=None):
    try:
        train(parse_args(argv))
    except (OSError, KeyboardInterrupt) as error:  # once it trains, signals end it in their own way
        fail(f"stopped, what was saved is intact: {str(error) or 'interrupted'}", 2 if str(error) else 130)
if __name__ == "__main__":
    main()
