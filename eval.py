"""Evaluate runs of train.py: how well do frozen features predict the labels?

python eval.py runs/cifar10-vicreg                  # a table, and runs/cifar10-vicreg/eval.json
python eval.py runs/cifar10-vicreg --random-init    # the encoder before its training
python eval.py runs/* --plot runs.png               # the online probes' accuracies
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import train
from duality import diagnose, lemma_3_4, norms4


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=train.HelpFormatter)
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="a folder that train.py has written")
    add("--random-init", action="store_true", help="evaluate the encoder before its training")
    add("--data-dir", type=Path, help="if not the data that the run had")
    add("--device", choices=train.DEVICES, default=train.DEVICES[0], help="to compute on")
    add("--epochs", type=train.number(int, 1, 1e6), default=100, help="of the linear probe")
    add("--k", type=train.number(int, 1, 1e6), default=10, help="nearest neighbors")
    add("--plot", type=Path, metavar="FILE", help="only draw a picture; needs matplotlib")
    return parser.parse_args(argv)


# ---- Measures ------------------------------------------------------------------------------------


@torch.no_grad()
def extract(model, data, args):
    """Features (N, F), in float32, and labels (N,) of a set's images, not augmented."""
    # arrays that are filled in place: the features of ImageNet have 10 GB
    features = torch.empty(len(data), model.projector[0].in_features, device=args.device)
    labels = torch.empty(len(data), dtype=torch.int64, device=args.device)
    end = 0
    for images, y in tqdm(train.plain_batches(data, args), "features", leave=False, disable=None):
        begin, end = end, end + len(y)
        features[begin:end], labels[begin:end] = model.encoder(images), y
    return features, labels


def linear_probe(train_x, train_y, test_x, test_y, classes, epochs=100, batch=1000, lr=0.03):
    """Last epoch's top-1 and top-5, in %, of a linear classifier of standardized features."""
    mean, std = train_x.mean(0), train_x.std(0).clamp_min(1e-6)
    probe = torch.nn.Linear(train_x.shape[1], classes, device=train_x.device)
    torch.nn.init.zeros_(probe.weight)
    torch.nn.init.zeros_(probe.bias)
    optimizer = torch.optim.AdamW(probe.parameters(), lr, weight_decay=1e-4)
    steps = epochs * len(train_x.split(batch))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in tqdm(range(epochs), "linear probe", leave=False, disable=None):
        order = torch.randperm(len(train_x), generator=train.generator(epoch))
        for index in order.to(train_x.device).split(batch):
            logits = probe((train_x[index] - mean) / std)
            F.cross_entropy(logits, train_y[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
            cosine.step()
    with torch.no_grad():
        logits = torch.cat([probe((x - mean) / std) for x in test_x.split(batch)])
    hits = logits.topk(min(5, classes)).indices == test_y[:, None]  # (N, 5)
    return [100 * hits[:, :k].any(1).float().mean().item() for k in (1, 5)]


@torch.no_grad()
def knn(train_x, train_y, test_x, test_y, classes, k=10, temperature=0.07):
    """Top-1, in %, of the k nearest features' votes, weighted by exp(cosine / temperature)."""
    lengths = train_x.norm(dim=1).clamp_min(1e-12)
    right, chunk = 0, max(1, 2**27 // len(train_x))  # half a gigabyte of cosines at a time
    for x, y in zip(test_x.split(chunk), test_y.split(chunk)):
        cosines = (F.normalize(x) @ train_x.T).div_(lengths)
        nearest = cosines.topk(min(k, len(train_x)))
        votes = torch.zeros(len(x), classes, device=x.device)
        votes.scatter_add_(1, train_y[nearest.indices], (nearest.values / temperature).exp())
        right += (votes.argmax(1) == y).sum().item()
    return 100 * right / len(test_x)


@torch.no_grad()
def embedding_statistics(projector, features, batch):
    """RankMe of all embeddings, and the paper's measures of a random batch, normalized."""
    z = torch.cat([projector(part) for part in features.split(500)])
    order = torch.randperm(len(z), generator=train.generator(0)).to(z.device)
    x = F.normalize(z[order[:batch]])
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


# ---- Runs ----------------------------------------------------------------------------------------


def evaluate(run, args):
    """Returns the table, a dict; asserts that the network has not changed."""
    saved = train.load_checkpoint(run) or sys.exit(f"{run} is no folder of a run")
    settings = argparse.Namespace(**vars(train.parse_args([])) | saved["settings"])
    settings.data_dir, settings.device = args.data_dir or settings.data_dir, args.device
    torch.manual_seed(settings.seed)
    model = train.Model(settings)
    if not args.random_init:
        model.load_state_dict(saved["state_dicts"]["model"])
    model.to(args.device, memory_format=torch.channels_last).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    *sets, classes = train.load(settings)
    features = [x for data in sets for x in extract(model, data, settings)]
    test_x = features[2]
    top1, top5 = linear_probe(*features, len(classes), args.epochs)
    table = dict(criterion=settings.criterion, steps=0 if args.random_init else saved["step"])
    table.update(linear_top1=top1, linear_top5=top5)
    table.update(knn_top1=knn(*features, len(classes), args.k), k=args.k)
    table.update(features=test_x.shape[1], rankme=diagnose(test_x)["rankme"].item())
    table.update(embedding_statistics(model.projector, test_x, settings.batch_size))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    return table


def plot(runs, file):
    """Draws the online probe's test accuracy over steps, and eval.json's linear probe as a star."""
    from matplotlib.figure import Figure

    axes = Figure((6, 4), layout="constrained").subplots()
    for run in runs:
        log = map(json.loads, open(run / "log.jsonl"))
        points = [(line["step"], line["probe_test"]) for line in log if "probe_test" in line]
        (curve,) = axes.plot(*torch.tensor(points).reshape(-1, 2).T, ".-", label=run.name)
        if (run / "eval.json").exists():
            try:
                table = json.loads((run / "eval.json").read_text())
            except ValueError as error:
                sys.exit(f"{run}/eval.json is damaged: {error}")
            axes.plot(table["steps"], table["linear_top1"], "*", color=curve.get_color(), ms=12)
    axes.set(xlabel="steps", ylabel="test top-1 (%): dots online, stars offline")
    axes.legend()
    axes.figure.savefig(file, dpi=150)


def main():
    args = parse_args()
    if args.plot:
        return plot([run for run in args.runs if (run / "log.jsonl").exists()], args.plot)
    train.join(args.device)
    failed = False
    for run in args.runs:
        try:
            table = evaluate(run, args)
            print(run)
            for name, value in table.items():
                print(f"{name:30}{value:.4g}" if isinstance(value, float) else f"{name:30}{value}")
            (run / "eval.new").write_text(json.dumps(table))
            (run / "eval.new").replace(run / f"eval{args.random_init * '-random-init'}.json")
        except (OSError, SystemExit) as error:
            failed = True
            print(f"eval.py: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ImportError, OSError, ValueError) as error:  # ValueError: an unknown picture format
        sys.exit(f"eval.py: {str(error).strip().splitlines()[-1]}")
