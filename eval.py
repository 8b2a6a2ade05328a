"""Evaluate runs of train.py on frozen features.

    python eval.py runs/cifar10-vicreg                  # table, and runs/cifar10-vicreg/eval.json
    python eval.py runs/cifar10-vicreg --random-init    # the untrained encoder, eval-random-init.json
    python eval.py runs/* --plot runs.png               # the online probe's accuracy against epochs

Linear probe (last epoch), weighted kNN, RankMe, proposition 3.1's statistics and lemma 3.4's bounds.
"""
import argparse, json, time
from pathlib import Path
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
import train
from duality import diagnose, lemma_3_4, normalize, norms4

def parse_args(argv=None):
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.error = lambda message: train.fail(f"{message} (-h lists the options)")
    cli.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a folder that train.py --out wrote")
    cli.add_argument("--random-init", action="store_true", help="evaluate the encoder before training")
    cli.add_argument("--data-dir", metavar="DIR", help="default: the run's")
    cli.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    cli.add_argument("--workers", type=train.number(int, 0, 256), default=4, metavar="N", help="default: 4")
    cli.add_argument("--epochs", type=train.number(int, 1), default=100, metavar="N",
                     help="of the linear probe; default: 100")
    cli.add_argument("--k", type=train.number(int, 1), default=10, metavar="N",
                     help="neighbours that vote; default: 10")
    cli.add_argument("--plot", type=Path, metavar="FILE", help="only draw the accuracies; needs matplotlib")
    return cli.parse_args(argv)

@torch.no_grad()
def extract(model, data, split):
    """Features (N, F), embeddings (N, D) and labels (N,) of a split's images, not augmented, in float32."""
    model.eval()
    parts = []
    batches = -(-data.size[split] // 500)
    for images, labels in tqdm(data.plain(split), f"{split} features", batches, leave=False, disable=None):
        features = model.encoder(images)
        parts.append((features, model.projector(features), labels))
    return [torch.cat(column) for column in zip(*parts)]

def top(logits, labels, k):
    """Share of the rows, in %, whose label is among the k highest logits."""
    best = logits.topk(min(k, logits.shape[1])).indices
    return 100 * (best == labels[:, None]).any(1).sum().item() / len(labels)

def linear_probe(train_x, train_y, test_x, test_y, classes, epochs=100, batch=1000, lr=0.03):
    """Last-epoch top-1 and top-5, in %, of a linear classifier on features standardised by the training set.

    AdamW, cosine schedule, no augmentation, so that the features are computed once.
    """
    mean, std = train_x.mean(0), train_x.std(0).clamp_min(1e-6)
    train_x, test_x = (train_x - mean) / std, (test_x - mean) / std
    probe = nn.Linear(train_x.shape[1], classes, device=train_x.device)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.AdamW(probe.parameters(), lr, weight_decay=1e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(train_x) // batch))
    for epoch in tqdm(range(epochs), "linear probe", leave=False, disable=None):
        order = torch.randperm(len(train_x), generator=train.generator("cpu", 0, epoch, 3)).to(train_x.device)
        for index in order.split(batch):
            F.cross_entropy(probe(train_x[index]), train_y[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
            cosine.step()
    logits = probe(test_x).detach()
    return top(logits, test_y, 1), top(logits, test_y, 5)

@torch.no_grad()
def knn(train_x, train_y, test_x, test_y, classes, k=10, temperature=0.07):
    """Top-1, in %, of the votes of the k nearest training features, weighted exp(cosine / temperature)."""
    train_x, test_x, right = normalize(train_x), normalize(test_x), 0
    for x, y in zip(test_x.split(500), test_y.split(500)):
        near = (x @ train_x.T).topk(min(k, len(train_x)))
        votes = torch.zeros(len(x), classes, device=x.device)
        votes.scatter_add_(1, train_y[near.indices], (near.values / temperature).exp())
        right += (votes.argmax(1) == y).sum().item()
    return 100 * right / len(test_x)

def load(run):
    saved = train.load_checkpoint(run / "checkpoint.pt")
    return saved or train.fail(f"{run}: no checkpoint.pt there; RUN is a folder that train.py --out wrote")

def evaluate(run, args):
    """The table, as a dict; asserts that the network, batch norms included, is bit-identical afterwards."""
    began, saved = time.time(), load(run)
    settings = argparse.Namespace(**saved["settings"], device=args.device, workers=args.workers)
    settings.compile = False
    settings.data_dir = args.data_dir or settings.data_dir
    settings.precision = "fp32"  # whatever the run's device could do
    device, *_ = train.start(settings)
    data = train.Data(settings, device)
    torch.manual_seed(settings.seed)
    model = train.Model(settings.arch, settings.image_size, settings.projector, data.classes)
    if not args.random_init:
        model.load_state_dict(saved["state"][0])
    model.to(device, memory_format=torch.channels_last)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_x, _, train_y = extract(model, data, "train")
    test_x, embeddings, test_y = extract(model, data, "test")
    top1, top5 = linear_probe(train_x, train_y, test_x, test_y, data.classes, args.epochs)
    nearest = knn(train_x, train_y, test_x, test_y, data.classes, args.k)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    # a batch's embeddings, of norm 1: lemma 3.4 and proposition 3.1
    z = normalize(embeddings[torch.randperm(len(embeddings))[:settings.batch_size].to(device)])
    (n, d), seen = z.shape, diagnose(z)
    least, greatest = lemma_3_4(n, d)
    return dict(
        linear_top1=top1, linear_top5=top5, knn_top1=nearest, rankme=diagnose(test_x)["rankme"].item(),
        rankme_embeddings=diagnose(embeddings)["rankme"].item(), features=test_x.shape[1], embeddings=d,
        negative_mean=seen["negative_mean"].item(),
        negative_variance_times_d=seen["negative_variance"].item() * d,  # 1 by prop 3.1
        norms4_over_least=norms4(z.T).item() / least, norms4_greatest_over_least=greatest / least,
        criterion=settings.criterion, steps=0 if args.random_init else saved["step"], k=args.k,
        seconds=time.time() - began)

def plot(runs, path):
    """Draws the online probe's test accuracy against epochs, mean and range of each criterion's runs."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        train.fail("--plot needs matplotlib: pip install matplotlib")
    curves = {}
    for run in runs:
        settings, log = load(run)["settings"], map(json.loads, (run / "log.jsonl").read_text().splitlines())
        label = " ".join((settings["criterion"], *(f"{k}={v}" for k, v in settings["set"].items())))
        accuracies = torch.tensor([record["probe_test"] for record in log if "probe_test" in record])
        curves.setdefault(label, []).append(accuracies)
    figure = Figure((6, 4), layout="constrained")
    axes = figure.subplots()
    for label, seeds in curves.items():
        values = torch.stack([curve[:min(map(len, seeds))] for curve in seeds])
        epochs = range(1, values.shape[1] + 1)
        axes.plot(epochs, values.mean(0), ".-", label=label + f", mean of {len(seeds)}" * (len(seeds) > 1))
        axes.fill_between(epochs, values.amin(0), values.amax(0), alpha=0.2)
    axes.set(xlabel="epoch", ylabel="online linear probe, test top-1 (%)")
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        train.fail(f"--plot {path}: {error}")

def main():
    args = parse_args()
    try:
        if args.plot:
            return plot(args.runs, args.plot)
        for run in args.runs:
            result = evaluate(run, args)
            for name, value in result.items():
                print(f"{name:30}{value:.4g}" if isinstance(value, float) else f"{name:30}{value}")
            name = "eval-random-init.json" if args.random_init else "eval.json"
            train.save(run / name, json.dumps(result, indent=1).encode() + b"\n")
    except OSError as error:
        train.fail(f"a file cannot be written or read: {error}")

if __name__ == "__main__":
    main()
