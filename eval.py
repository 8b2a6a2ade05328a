"""Evaluate runs of train.py: how well do frozen features predict the labels?

python eval.py runs/cifar10-vicreg                  # a table, and runs/cifar10-vicreg/eval.json
python eval.py runs/cifar10-vicreg --random-init    # the encoder before its training
python eval.py runs/cifar10-vicreg --patches        # random patches, a baseline of no training
python eval.py runs/* --plot runs.png               # the online probes' accuracies
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import train
from duality import diagnose, lemma_3_4, normalize, norms4


def parse_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.error = lambda message: train.fail(f"{message} (-h lists the options)")
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="a folder that train.py has written")
    instead = parser.add_mutually_exclusive_group().add_argument
    const = dict(action="store_const", dest="baseline")
    instead("--random-init", **const, const="random-init", help="the encoder before its training")
    instead("--patches", **const, const="patches", help="random whitened patches as features")
    add("--data-dir", metavar="DIR", help="default: the run's")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="default: auto")
    add("--workers", type=int, default=train.cores(), metavar="N", help="default: cores, up to 8")
    add("--epochs", type=int, default=100, metavar="N", help="of the linear probe; default: 100")
    add("--k", type=int, default=10, metavar="N", help="nearest neighbours; default: 10")
    add("--plot", type=Path, metavar="FILE", help="only draw a picture; needs matplotlib")
    args = parser.parse_args(argv)
    for name, least in dict(epochs=1, k=1, workers=0).items():
        if getattr(args, name) < least:
            train.fail(f"--{name} {getattr(args, name)}: not {least} or more")
    if train.environment("WORLD_SIZE", 1) > 1:
        train.fail("runs in one process, without torchrun")
    return args


# ---- Measures ------------------------------------------------------------------------------------


@torch.no_grad()
def extract(encoder, data, split):
    """Features (N, F), in float32, and labels (N,) of a set's images, not augmented."""
    _, labels = data.sets[split]
    features, done = None, 0  # of all images, one tensor: ImageNet's take half the memory
    for images, _ in tqdm(data.plain(split), f"{split} features", leave=False, disable=None):
        part = encoder(images)
        if features is None:
            features = part.new_empty(len(labels), part.shape[1])
        features[done : done + len(part)] = part
        done += len(part)
    return features, labels.to(features.device)  # files have theirs on the CPU


def linear_probe(train_x, train_y, test_x, test_y, classes, epochs=100, batch=1000, lr=0.03):
    """Last epoch's top-1 and top-5, in %, of a linear classifier of standardised features."""
    mean, std = train_x.mean(0), train_x.std(0).clamp_min(1e-6)
    probe = nn.Linear(train_x.shape[1], classes, device=train_x.device)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.AdamW(probe.parameters(), lr, weight_decay=1e-4)
    steps = epochs * math.ceil(len(train_x) / batch)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in tqdm(range(epochs), "linear probe", leave=False, disable=None):
        draw = train.generator("cpu", 0, epoch, 3)
        order = torch.randperm(len(train_x), generator=draw).to(train_x.device)
        for index in order.split(batch):
            logits = probe((train_x[index] - mean) / std)
            F.cross_entropy(logits, train_y[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
            cosine.step()
    with torch.no_grad():
        logits = torch.cat([probe((x - mean) / std) for x in test_x.split(batch)])
    hits = logits.topk(min(5, classes)).indices == test_y[:, None]  # (N, 5)
    return tuple(100 * hits[:, :k].any(1).float().mean().item() for k in (1, 5))


@torch.no_grad()
def knn(train_x, train_y, test_x, test_y, classes, k=10, temperature=0.07):
    """Top-1, in %, of the votes of the k nearest features, weighted exp(cosine / temperature)."""
    norms = train_x.norm(dim=1).clamp_min(1e-12)
    right, chunk = 0, max(1, 2**27 // len(train_x))  # half a gigabyte of cosines at a time
    for x, y in zip(test_x.split(chunk), test_y.split(chunk)):
        cosines = (normalize(x) @ train_x.T).div_(norms)
        nearest = cosines.topk(min(k, len(train_x)))
        votes = torch.zeros(len(x), classes, device=x.device)
        votes.scatter_add_(1, train_y[nearest.indices], (nearest.values / temperature).exp())
        right += (votes.argmax(1) == y).sum().item()
    return 100 * right / len(test_x)


class Patches(nn.Module):
    """Random whitened patches of images as an encoder, not trained (Coates and Ng 2011)."""

    def __init__(self, images, n=400, size=6):
        super().__init__()
        self.size = size
        images = images[: max(1, 2**19 // images[0, 0].numel())]  # about 400,000 patches
        patches = self.cut(images).flatten(0, 1)
        draw = train.generator("cpu", 0, 4)
        patches = patches[torch.randperm(len(patches), generator=draw)[:100_000].to(images.device)]
        # zero-phase whitening: W = V (E + eps)^-1/2 V^T, C = V E V^T
        variances, directions = torch.linalg.eigh(patches.T.cov().cpu())
        whiten = (directions / (variances + 0.1).sqrt()) @ directions.T
        whiten = whiten.to(images.device)
        self.mean = patches.mean(0)
        filters = normalize((patches[:n] - self.mean) @ whiten)  # (n, 3 size^2)
        self.filters = whiten @ filters.T

    def cut(self, images):
        """All patches of images (B, 3, S, S), each of mean 0 and variance 1: (B, L, 3 size^2)."""
        x = F.unfold(images, self.size).mT
        return (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True) + 0.01).sqrt()

    def forward(self, images):
        return torch.cat([self.features(part) for part in images.split(4)])

    def features(self, images):
        """How much patches resemble the filters and their negatives, in four quarters: (B, 8 n)."""
        side = images.shape[2] - self.size + 1
        x = ((self.cut(images) - self.mean) @ self.filters).mT.unflatten(2, (side, side))
        pooled = [F.adaptive_avg_pool2d(F.relu(y - 0.5), 2) for y in (x, -x)]  # (B, n, 2, 2)
        return torch.cat(pooled, 1).flatten(1)


# ---- Runs ----------------------------------------------------------------------------------------


def load(run):
    saved = train.load_checkpoint(run / "checkpoint.pt")
    return saved or train.fail(f"{run}: no checkpoint.pt there; RUN is a folder of train.py's")


def evaluate(run, args):
    """The table, a dict. The network is asserted to be bit-identical afterwards."""
    began = time.time()
    saved = load(run)
    here = dict(device=args.device, workers=args.workers, precision="fp32", compile=False)
    settings = argparse.Namespace(**(saved["settings"] | here))
    settings.data_dir = args.data_dir or settings.data_dir
    process = train.start(settings)
    data = train.Data(settings, process)
    torch.manual_seed(settings.seed)
    classes = len(saved["states"]["model"]["probe.bias"])  # --data-dir may have others
    model = train.Model(settings.arch, settings.image_size, settings.projector, classes)
    if not args.baseline:
        model.load_state_dict(saved["states"]["model"])
    model.to(process.device, memory_format=train.memory_format(process.device)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    encoder = Patches(next(data.plain("train"))[0]) if args.baseline == "patches" else model.encoder
    train_x, train_y = extract(encoder, data, "train")
    test_x, test_y = extract(encoder, data, "test")
    features = train_x, train_y, test_x, test_y, data.classes
    top1, top5 = linear_probe(*features, args.epochs)
    steps = 0 if args.baseline else saved["step"]
    found = dict(criterion=settings.criterion, features=test_x.shape[1], steps=steps)
    found.update(linear_top1=top1, linear_top5=top5, knn_top1=knn(*features, args.k), k=args.k)
    found.update(rankme=diagnose(test_x)["rankme"].item())
    if args.baseline != "patches":
        found.update(embedding_statistics(model, test_x, settings.batch_size))
    data.loaders.clear()  # ends their processes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    return dict(found, seconds=time.time() - began)


@torch.no_grad()
def embedding_statistics(model, features, batch):
    z = torch.cat([model.projector(part) for part in features.split(500)])
    draw = train.generator("cpu", 0, 5)
    x = normalize(z[torch.randperm(len(z), generator=draw)[:batch].to(z.device)])
    n, d = x.shape
    least, most = lemma_3_4(n, d)
    seen = diagnose(x)
    return dict(
        embeddings=d,
        rankme_embeddings=diagnose(z)["rankme"].item(),
        norms4_over_least=norms4(x.T).item() / least,
        norms4_most_over_least=most / least,
        negative_mean=seen["negative_mean"].item(),  # tends to 0 (proposition 3.1)
        negative_variance_times_d=d * seen["negative_variance"].item(),  # tends to 1
    )


def minutes_of(looks):
    """Minutes of training until each look at the usual speed, without pauses and other jobs."""
    seconds = torch.tensor([look["seconds"] for look in looks])
    speed = torch.tensor([look["samples_per_s"] for look in looks])
    neighbours = F.pad(speed[None], (50, 50), "replicate")[0].unfold(0, 101, 1)  # (looks, 101)
    usual_speed = neighbours.median(1).values
    return (seconds * speed / usual_speed).cumsum(0) / 60


def plot(runs, path):
    """Draws the online probe's test accuracy over minutes, and what eval.py has found, if any."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        train.fail("--plot needs matplotlib: pip install matplotlib")
    figure = Figure((6, 4), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        load(run)  # fails if that is no run
        try:
            plot_run(run, axes)
        except ValueError as error:
            train.fail(f"{run}: log.jsonl or an eval*.json is empty or damaged ({error})")
    axes.set(xlabel="minutes of training", ylabel="test top-1 (%): dots online, stars offline")
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        train.fail(f"--plot {path}: {error}")


def plot_run(run, axes):
    records = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    looks = [record for record in records if "seconds" in record]
    if not looks:
        raise ValueError("no step is logged")
    minutes = minutes_of(looks)
    tests = [(m, look["probe_test"]) for m, look in zip(minutes, looks) if "probe_test" in look]
    (curve,) = axes.plot(*torch.tensor(tests).reshape(-1, 2).T, ".-", label=run.name)
    for found in sorted(run.glob("eval*.json")):
        value = json.loads(found.read_text())["linear_top1"]
        if found.name == "eval.json":
            axes.plot(minutes[-1], value, "*", color=curve.get_color(), markersize=12)
        else:
            axes.axhline(value, color="grey", linestyle=":")
            axes.annotate(found.stem.replace("eval-", ""), (0, value), va="bottom")


def main():
    args = parse_args()
    if args.plot:
        return plot(args.runs, args.plot)
    for run in args.runs:
        found = evaluate(run, args)
        suffix = f"-{args.baseline}" if args.baseline else ""
        (run / f"eval{suffix}.json").write_text(json.dumps(found, indent=1))
        print(run)
        for name, value in found.items():
            print(f"{name:30}{value:.4g}" if isinstance(value, float) else f"{name:30}{value}")


if __name__ == "__main__":
    train.run_program(main)
