"""Evaluate a run of train.py on frozen features: python eval.py RUN [--random-init]

Linear probe, weighted kNN, RankMe, the statistics of proposition 3.1 and the closeness to the bounds of lemma 3.4, as
a table and in RUN/eval.json. --random-init does the same for the untrained encoder, in RUN/eval-random-init.json.
"""
import json
import time
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import duality
import train


def parse_args(argv=None):
    parser = train.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder that train.py --out wrote")
    parser.add_argument("--random-init", action="store_true", help="evaluate the encoder as it was before training")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="default: the run's")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    parser.add_argument("--epochs", type=train.number(int, 1, 10_000), default=100, metavar="N",
                        help="of the linear probe; default: 100")
    parser.add_argument("--k", type=train.number(int, 1, 10_000), default=10, metavar="N",
                        help="neighbours of the kNN classifier; default: 10")
    return parser.parse_args(argv)


@torch.no_grad()
def extract(model, data, split):
    """Features (N, F), embeddings (N, D) and labels (N,) of a split's images, not augmented, in float32."""
    model.eval()
    parts = []
    for images, labels in tqdm(data.plain(split), f"{split} features", -(-data.size[split] // 500), leave=False):
        features = model.encoder(images)
        parts.append((features.float(), model.projector(features).float(), labels))
    return [torch.cat(column) for column in zip(*parts)]


def topk(logits, labels, k):
    """Share of the rows, in %, whose label is among the k highest logits."""
    return 100 * (logits.topk(min(k, logits.shape[1])).indices == labels[:, None]).any(1).float().mean().item()


def linear_probe(train_x, train_y, test_x, test_y, classes, epochs=100, batch=1000, lr=3e-2, seed=0):
    """Last-epoch top-1 and top-5, in %, of a linear classifier on features standardised by the training set's statistics.

    Adam, cosine schedule, no augmentation: the features are computed once.
    """
    mean, std = train_x.mean(0), train_x.std(0).clamp_min(1e-6)
    train_x, test_x = (train_x - mean) / std, (test_x - mean) / std
    probe = nn.Linear(train_x.shape[1], classes, device=train_x.device)
    nn.init.zeros_(probe.weight), nn.init.zeros_(probe.bias)
    steps = epochs * -(-len(train_x) // batch)
    optimizer = torch.optim.AdamW(probe.parameters(), lr, weight_decay=1e-4, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = train.generator("cpu", seed, 0, 3)
    for _ in tqdm(range(epochs), "linear probe", leave=False):
        for index in torch.randperm(len(train_x), generator=generator).to(train_x.device).split(batch):
            F.cross_entropy(probe(train_x[index]), train_y[index]).backward()
            optimizer.step(), scheduler.step(), optimizer.zero_grad()
    with torch.no_grad():
        logits = probe(test_x)
    return topk(logits, test_y, 1), topk(logits, test_y, 5)


@torch.no_grad()
def knn(train_x, train_y, test_x, test_y, classes, k=10, temperature=0.07):
    """Top-1, in %, of the vote of the k nearest training features, weighted exp(cosine / temperature)."""
    train_x, test_x, right = F.normalize(train_x), F.normalize(test_x), 0
    for x, y in zip(test_x.split(500), test_y.split(500)):
        near = (x @ train_x.T).topk(min(k, len(train_x)))
        votes = torch.zeros(len(x), classes, device=x.device)
        votes.scatter_add_(1, train_y[near.indices], (near.values / temperature).exp())
        right += (votes.argmax(1) == y).sum().item()
    return 100 * right / len(test_x)


def evaluate(args):
    began, path = time.time(), args.run / "checkpoint.pt"
    saved = train.load_checkpoint(path)
    if saved is None:
        train.fail(f"{path}: no such file; RUN is a folder that train.py --out wrote")
    settings = Namespace(**saved["settings"], device=args.device, workers=4, compile=False)
    settings.data_dir = args.data_dir or (settings.data_dir and Path(settings.data_dir))
    device, _, _ = train.start(settings)
    data = train.Data(settings, device)
    torch.manual_seed(settings.seed)
    model = train.Model(settings.arch, settings.image_size, settings.projector, data.classes)
    if not args.random_init:
        model.load_state_dict(saved["model"])
    model.to(device, memory_format=torch.channels_last)

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_x, _, train_y = extract(model, data, "train")
    test_x, embeddings, test_y = extract(model, data, "test")
    linear = linear_probe(train_x, train_y, test_x, test_y, data.classes, args.epochs)
    neighbours = knn(train_x, train_y, test_x, test_y, data.classes, args.k)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()), "the encoder changed"

    batch = F.normalize(embeddings[:settings.batch_size].double() if device.type != "mps" else embeddings[:settings.batch_size])
    n, d = batch.shape
    seen = {name: value.item() for name, value in duality.diagnose(batch).items()}
    least, greatest = duality.lemma_3_4(n, d)
    return dict(linear_top1=linear[0], linear_top5=linear[1], knn_top1=neighbours, k=args.k,
                rankme=duality.diagnose(test_x)["rankme"].item(), feature_dimension=test_x.shape[1],
                rankme_embeddings=duality.diagnose(embeddings)["rankme"].item(), embedding_dimension=d,
                negative_mean=seen["negative_mean"], negative_variance_times_d=seen["negative_variance"] * d,
                lemma_3_4_over_lower_bound=duality.norms4(batch.T).item() / least, lemma_3_4_upper_over_lower=greatest / least,
                criterion=settings.criterion, epochs=0 if args.random_init else saved["step"], seconds=time.time() - began)


def main():
    args = parse_args()
    result = evaluate(args)
    for name, value in result.items():
        print(f"{name:28} {value:.4g}" if isinstance(value, float) else f"{name:28} {value}")
    train.save_text(args.run / ("eval-random-init.json" if args.random_init else "eval.json"), json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
