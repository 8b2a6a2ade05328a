"""Tests: `pytest test_duality.py`. What the criteria cost: `python test_duality.py --benchmark`.

PLAIN has each criterion, slowly, from its formula; PUBLISHED the code that people use, restated with the same
operations. Then come the benchmark and the tests, in the order of duality.py.
"""
import argparse, inspect, itertools, json, math, os, re, runpy, statistics, sys, tempfile, time
from functools import cache, partial
from unittest import mock

import torch
import torch.nn.functional as F

import duality
from duality import CRITERIA

# --- Plain references: from the formula ---------------------------------------------------------------------
unit = lambda z: z / z.norm(dim=1, keepdim=True)
centered = lambda z: z - z.mean(0)
standardized = lambda z: centered(z) / (centered(z).square().mean(0) + 1e-5).sqrt()
spread = lambda z: unit(centered(z).T).T * (len(z) / z.shape[1]) ** 0.5
off_diagonal = lambda m: torch.stack([m[i, j] for i in range(len(m)) for j in range(len(m)) if i != j])

def plain_vicreg(za, zb, invariance=25.0, variance=25.0, covariance=1.0, temperature=None, transpose=False):
    loss = invariance * (za - zb).square().sum() / za.numel()
    for z in (za, zb):
        k = centered(z) if transpose else centered(z).T
        c, size = k @ k.T / (k.shape[1] - 1), len(k)
        v, c_ij = F.relu(1 - (c.diagonal() + 1e-4).sqrt()), off_diagonal(c).view(size, size - 1)
        repulsion = (c_ij / temperature).exp().sum(1).log() if temperature else c_ij.square().sum(1)
        loss = loss + (variance / 2 * v.sum() + covariance * repulsion.sum()) / size
    return loss

def plain_contrastive(za, zb, temperature=0.2, negatives="both", s=lambda x: x, ready=unit, decoupled=False):
    za, zb, loss = ready(za), ready(zb), 0
    for x, y in ((za, zb), (zb, za)):
        for i in range(len(x)):
            positive = (s(x[i] @ y[i]) / temperature).exp()
            others = [x[j] for j in range(len(x)) if j != i]
            others += [y[j] for j in range(len(x)) if j != i and negatives == "both"]
            below = sum((s(x[i] @ u) / temperature).exp() for u in others) + (0 if decoupled else positive)
            loss = loss - (positive / below).log() / (2 * len(x))
    return loss

def plain_spectral(za, zb, radius=3.0):
    za, zb = (torch.stack([x * min(radius / x.norm(), 1) for x in z]) for z in (za, zb))
    return -2 * (za * zb).sum(1).mean() + off_diagonal(za @ zb.T).square().mean()

def plain_barlow_twins(za, zb, redundancy=0.0051):
    c = standardized(za).T @ standardized(zb) / len(za)
    return (1 - c.diagonal()).square().sum() + redundancy * off_diagonal(c).square().sum()

def plain_tcr(za, zb, invariance=1.0, eps=0.5):
    za, zb, (n, d) = unit(za), unit(zb), za.shape
    rate = sum(torch.logdet(torch.eye(d) + d / (n * eps**2) * z.T @ z) / 2 for z in (za, zb))
    return (invariance * (za - zb).square().sum() - rate / 2) / n

def plain_pair(za, zb, invariance=25.0, repulsion=1.0, k=lambda z: z):
    za, zb = spread(za), spread(zb)
    squares = sum(off_diagonal(k(z) @ k(z).T).square().sum() for z in (za, zb))
    return (invariance * (za - zb).square().sum() + repulsion / 2 * squares) / len(za)

PLAIN = {
    "vicreg": plain_vicreg, "vicreg-contrastive": plain_vicreg,
    "vicreg-exp": partial(plain_vicreg, covariance=25.0, temperature=0.1),
    "vicreg-ctr": partial(plain_vicreg, covariance=25.0, temperature=0.1, transpose=True),
    "simclr": plain_contrastive, "dcl": partial(plain_contrastive, decoupled=True),
    "simclr-sq": partial(plain_contrastive, s=torch.square),
    "simclr-abs": partial(plain_contrastive, s=torch.abs),
    "dcl-sq": partial(plain_contrastive, s=torch.square, decoupled=True),
    "dcl-abs": partial(plain_contrastive, s=torch.abs, decoupled=True),
    "simclr-centered": partial(plain_contrastive, ready=lambda z: unit(centered(z))),
    "simclr-standardized": partial(plain_contrastive, ready=spread),
    "spectral": plain_spectral, "barlow-twins": plain_barlow_twins, "tcr": plain_tcr,
    "sample-contrastive": plain_pair, "dimension-contrastive": partial(plain_pair, k=lambda z: z.T),
    "chain": lambda *zs, t=1.5: sum(max(0, 1 - abs(t - k)) * PLAIN[c](*zs) for k, c in enumerate(CHAIN)),
}
CHAIN = ["vicreg", "vicreg-exp", "vicreg-ctr", "simclr"]

# --- Published code, with the same operations ---------------------------------------------------------------
own = lambda c: torch.eye(len(c), dtype=torch.bool, device=c.device)
masked = lambda c: c[~own(c)]  # lightly's way to the entries off the diagonal; the official codes':
strided = lambda c: c.flatten()[:-1].view(len(c) - 1, len(c) + 1)[:, 1:].flatten()
naive_log_sum_exp = lambda c: (c / 0.1).masked_fill(own(c), -math.inf).logsumexp(1).mean()

def published_vicreg(za, zb, repulsion=lambda c: strided(c).pow(2).sum() / len(c), weight=1.0):
    loss = 25.0 * F.mse_loss(za, zb)
    for z in (za, zb):
        z = z - z.mean(0)
        loss = loss + 25.0 / 2 * F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()
        loss = loss + weight * repulsion(z.T @ z / (len(z) - 1))
    return loss

def published_barlow_twins(za, zb):
    batch_norm = torch.nn.BatchNorm1d(za.shape[1], affine=False).to(za)
    c = (batch_norm(za).T @ batch_norm(zb)).div_(len(za))
    return c.diagonal().add_(-1).pow_(2).sum() + 0.0051 * strided(c).pow_(2).sum()

def published_simclr(za, zb, temperature=0.2):
    za, zb, n, logits = F.normalize(za), F.normalize(zb), len(za), []
    for x, y in ((za, zb), (zb, za)):
        logits += [torch.cat((x @ y.T / temperature, masked(x @ x.T / temperature).view(n, n - 1)), 1)]
    return F.cross_entropy(torch.cat(logits), torch.arange(n, device=za.device).repeat(2))

def published_dcl(za, zb, temperature=0.2):
    za, zb, n, loss = F.normalize(za), F.normalize(zb), len(za), 0
    for x, y in ((za, zb), (zb, za)):
        same, other = x @ x.T / temperature, x @ y.T / temperature
        negatives = torch.cat((masked(same).view(n, n - 1), masked(other).view(n, n - 1)), 1)
        loss = loss + (negatives.logsumexp(1) - other[own(other)]).mean() / 2
    return loss

PUBLISHED = {  # (criterion, whose code), at duality.py's defaults
    ("vicreg", "official"): published_vicreg,
    ("vicreg", "lightly"): partial(published_vicreg, repulsion=lambda c: masked(c).pow(2).sum() / len(c)),
    ("barlow-twins", "lightly"): published_barlow_twins,  # these are the official code's operations too
    ("simclr", "lightly"): published_simclr,
    ("dcl", "lightly"): published_dcl,
    ("vicreg-exp", "naive"): partial(published_vicreg, repulsion=naive_log_sum_exp, weight=25.0),
}

# --- The benchmark: needs the packages of duality.py only ---------------------------------------------------
def views(n, d, seed=0, noise=0.5, dtype=torch.float64):
    za, zb = torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return za.to(dtype), (za + noise * zb).to(dtype)

def step(function, *zs, **hyperparameters):
    """Value and gradients."""
    zs = [z if z.requires_grad else z.clone().requires_grad_() for z in zs]
    value = function(*zs, **hyperparameters)
    return value.detach(), *torch.autograd.grad(value, zs, materialize_grads=True)

def errors(found, exact):
    """Relative error of the value, and of the gradients together."""
    flat = lambda tensors: torch.cat([t.flatten().double() for t in tensors])
    pairs = [(flat(found[part]), flat(exact[part])) for part in (slice(1), slice(1, None))]
    return [((x - y).norm() / y.norm().clamp_min(1e-300)).item() for x, y in pairs]

def seconds(run, device):
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start

def median_ms(runs, device, budget):
    """Of each run; they take turns, so that what else the machine does falls on all alike."""
    times = [[seconds(run, device)] for run in runs]
    while sum(map(sum, times)) < budget * len(runs) and len(times[0]) < 50:
        for run, each in zip(runs, times):
            if each[0] < 0.1:
                run()  # the caches hold what the run before left
            if each[0] < 2:  # a slow one is timed once
                each.append(seconds(run, device))
    return [1e3 * statistics.median(each[1:] or each) for each in times]

def peak_mib(run, device):
    """The most memory that tensors made in run() have at a time, its results too."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    stderr, cpu = os.dup(2), torch.profiler.ProfilerActivity.CPU
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)  # the profiler would announce itself
        try:
            with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
                run()
            profile.export_chrome_trace(f"{folder}/trace.json")
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        with open(f"{folder}/trace.json") as file:
            events = [event for event in json.load(file)["traceEvents"] if event.get("name") == "[memory]"]
    changes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    return max(itertools.accumulate(changes)) / 2**20

def matrix(name, leaves):
    """What a criterion is seen to make."""
    spy = lambda part: mock.patch.object(duality, part, wraps=getattr(duality, part))
    with spy("dual_route") as dual, spy("checkpoint") as checkpoint:
        CRITERIA[name](*leaves)
    side = "2N" if name in ("simclr", "dcl") else "N" if dual.called else "D"
    return f"{side} x {side}" + ", blocks" * checkpoint.called

def products(name, za, zb):
    """The products that cannot be avoided: a matrix forwards, products with it backwards."""
    if name in ("simclr", "dcl"):
        return (z := torch.cat((za, zb))) @ z.T @ z
    a, b = (za, zb) if len(za) < za.shape[1] and name != "vicreg-exp" else (za.T, zb.T)
    if name == "barlow-twins" and a is not za:
        return (c := a @ b.T) @ b, c.T @ a
    return a @ a.T @ a, b @ b.T @ b

def compiled(name):
    torch.compiler.reset()  # it compiles `checked`, which all share, eight times at most
    terms = torch.compile(CRITERIA[name].terms, dynamic=False)
    return lambda *zs: sum(terms(*zs).values())

def benchmark(device, sizes, names, budget, compile=False):
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"Loss and gradient in float32, torch {torch.__version__}, {where}"
          "\nduality.py: matrix made, median ms, peak MiB, relative error of value and gradient | published"
          "\ncode: these, and its ms and MiB over duality.py's | bare products: ms, duality.py's over them"
          f"\n\n{'criterion':12} {'N':>4} {'D':>4} {'matrix':13} {'ms':>6} {'MiB':>6} {'errors':15} | {'':8}"
          f" {'ms':>7} {'ratio':>5} {'MiB':>6} {'ratio':>5} {'errors':15} | {'ms':>6} {'ratio':>5}")
    peak_mib(lambda: torch.ones(1, device=device), device)  # the profiler's first use is slow
    speeds = {}
    for name, (n, d) in itertools.product(names, sizes):
        if name == "vicreg-exp" and [n, d] != max(sizes, key=lambda size: (size[1], -size[0])):
            continue  # its D x D matrix is the same for all N: one size
        leaves = [z.to(device).requires_grad_() for z in views(n, d, dtype=torch.float32)]
        exact = step(CRITERIA[name], *(z.detach().double() for z in leaves))
        work = n * d * (n if name in ("simclr", "dcl") else d)
        peers = [whose for criterion, whose in PUBLISHED if criterion == name and (  # others would take 15 s
            work < 15 * speeds.get((name, whose), math.inf) or (n, d) == (256, 8192))]
        ours = compiled(name) if compile else CRITERIA[name]
        steps = [partial(step, f, *leaves) for f in (ours, *(PUBLISHED[name, peer] for peer in peers))]
        if compile:
            steps[0]()
        times = median_ms([partial(products, name, *(z.detach() for z in leaves)), *steps], device, budget)
        found = []
        for run, ms in zip(steps, times[1:]):
            mib = peak_mib(lambda: found.append(run()), device)
            found[-1] = ms, mib, "{:.1e} {:.1e}".format(*errors(found[-1], exact))
        speeds |= {(name, peer): work / ms * 1e3 for peer, (ms, *_) in zip(peers, found[1:])}
        ms, mib, error = found[0]
        ours = f"{name:12} {n:4} {d:4} {matrix(name, leaves):13} {ms:6.1f} {mib:6.1f} {error}"
        bare = f"{times[0]:6.1f} {ms / times[0]:5.2f}"
        for peer, (their_ms, their_mib, error) in zip(peers, found[1:]):
            print(f"{ours} | {peer:8} {their_ms:7.1f} {their_ms / ms:5.1f} {their_mib:6.1f} "
                  f"{their_mib / mib:5.1f} {error} | {bare}", flush=True)

def benchmark_views(budget):
    """Images per second of one CPU core, by torchvision's transforms of PIL images and by train.Views."""
    import train
    from torchvision import transforms as T
    torch.set_num_threads(1)
    images, batched = train.shapes(256, 0)[0], train.Views(32)
    pil = list(map(T.ToPILImage(), images))
    each = T.Compose([
        T.RandomResizedCrop(32, (0.2, 1)), T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8), T.RandomGrayscale(0.2),
        T.ToTensor(), T.Normalize(batched.mean.flatten(), batched.std.flatten())])
    compiled = train.Views(32)
    compiled.apply = torch.compile(compiled.apply, dynamic=False)  # as train.py --compile does
    runs = [lambda: torch.stack(list(map(each, pil))), lambda: batched(images), lambda: compiled(images)]
    compiled(images)
    one, *many = median_ms(runs, "cpu", 3 * budget)
    print(f"\nviews of 32-pixel images, one core: {256e3 / one:.0f} images/s by torchvision's PIL pipeline,"
          " by train.Views {:.0f}, ratio {:.1f}; compiled {:.0f}, ratio {:.1f}".format(
              *(x for ms in many for x in (256e3 / ms, one / ms))))

if __name__ == "__main__" and "--worker" not in sys.argv:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--benchmark", action="store_true", required=True)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--criteria", nargs="+", metavar="NAME", choices={name for name, _ in PUBLISHED},
                        default=["vicreg", "barlow-twins", "simclr", "vicreg-exp"])
    parser.add_argument("--sizes", nargs="+", metavar="NxD", type=lambda size: [*map(int, size.split("x"))],
                        default=[[n, d] for n in (256, 1024) for d in (512, 2048, 8192)])
    parser.add_argument("--seconds", type=float, default=0.3, help="of repeats, for each time measured")
    parser.add_argument("--compile", action="store_true", help="the criteria of duality.py")
    args = parser.parse_args()
    benchmark(args.device, args.sizes, args.criteria, args.seconds, args.compile)
    benchmark_views(args.seconds)
    raise SystemExit

# --- The tests ----------------------------------------------------------------------------------------------
import contextlib, multiprocessing, pickle, random, shlex, shutil, signal, subprocess, threading, urllib.error
from pathlib import Path
import matplotlib.axes
import numpy as np
import pytest  # here, as the benchmark does without
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image
from hypothesis import given, settings, strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any
import train
import eval as evaluation
from eval import knn, linear_probe

HERE = Path(__file__).parent
ACCELERATORS = [name for name, backend in dict(cuda=torch.cuda, mps=torch.backends.mps).items()
                if backend.is_available()]

SHAPES = [(8, 5), (5, 12), (12, 12), (6, 30)]
OTHER = dict(invariance=3.0, variance=2.0, covariance=0.7, repulsion=0.3, redundancy=0.1, temperature=0.07,
             negatives="own", radius=1.5, eps=0.3, t=0.3)  # than the defaults
every_criterion = pytest.mark.parametrize("name", CRITERIA)
every_shape = pytest.mark.parametrize("n, d", SHAPES)
in_blocks = pytest.mark.parametrize("block", [duality.BLOCK, 30])

def assert_equal(found, exact, tolerance=1e-10):
    for x, y in zip(found, exact, strict=True):
        assert x.shape == y.shape and (x - y).norm() <= tolerance * (1 + y.norm()), (x, y)

def keywords(name, **wanted):
    return {key: wanted[key] for key in inspect.signature(CRITERIA[name]).parameters if key in wanted}

def rotation(n):
    return torch.linalg.qr(views(n, n)[1]).Q

# --- The theorem ---
@pytest.mark.parametrize("n, d", [(2, 2), (40, 3), (3, 40), *SHAPES])
def test_theorem_3_3(n, d):
    z = views(n, d)[0]
    l_c, l_nc = (off_diagonal(k @ k.T).square().sum() for k in (z, z.T))
    embeddings, dimensions = (sum(x.norm() ** 4 for x in k) for k in (z, z.T))
    assert_equal((duality.L_c(z), duality.L_nc(z)), (l_c, l_nc))
    assert_equal((duality.norms4(z), duality.norms4(z.T)), (embeddings, dimensions))
    assert_equal([l_nc + dimensions], [l_c + embeddings])

@given(st.integers(2, 40), st.integers(2, 40), st.floats(0.1, 10), st.booleans())
@settings(deadline=None, derandomize=True, max_examples=60)
def test_lemma_3_4_and_corollary_3_4_1(n, d, a, transpose):
    x = unit(views(n, d)[0].exp())  # n embeddings in d dimensions; transposed, n dimensions of d embeddings
    low, high = duality.lemma_3_4(n, d, a)
    assert low - 1e-6 <= duality.norms4(a * x.T) <= high + 1e-6
    assert duality.norms4(torch.full((d, n), a / d**0.5)).item() == pytest.approx(low)
    assert duality.norms4(torch.tensor([[a] * n] + [[0] * n] * (d - 1))).item() == pytest.approx(high)
    L, dual, z = (duality.L_nc, duality.L_c, x.T) if transpose else (duality.L_c, duality.L_nc, x)
    low, high = duality.corollary_3_4_1(x)
    assert low - 1e-6 <= L(z) <= high + 1e-6
    assert_equal((low, high), (dual(z) - n + n**2 / d, dual(z) - n + n**2))

@every_shape
def test_rows_and_columns_of_like_norms(n, d):
    z = views(n, d)[0]
    for _ in range(2000):
        z = unit(unit(z).T).T * (n / d) ** 0.5
    # At the lower bound sum_j ||K_j,.||^4 = N^2 / M; with both norms 1, N = M: L_nc = L_c + N - M
    assert_equal([duality.L_nc(z)], [duality.L_c(z) + n - n**2 / d])
    assert duality.L_c(z) > 0.1

def test_module_shows_the_theorem(capsys):
    runpy.run_path(duality.__file__, run_name="__main__")
    assert re.search("(?s)theorem 3.3.*vicreg-exp.*simclr", capsys.readouterr().out)

# --- Two routes ---
@pytest.mark.parametrize("n, d", [(2, 9), (40, 3), (3, 40), *SHAPES])
def test_routes_are_equal(n, d):
    for a, b in (views(n, d), [z.T for z in views(n, d)]):
        weights = torch.arange(len(a), dtype=a.dtype)  # of the diagonal, so that its gradient is seen too
        cross = step(lambda a, b: off_diagonal(a @ b.T).square().sum() + weights @ (a @ b.T).diagonal(), a, b)
        same = step(lambda a: off_diagonal(a @ a.T).square().sum() + weights @ a.square().sum(1), a)
        for route in (duality.direct_route, duality.dual_route, duality.off_diagonal):
            value = lambda a, b: (found := route(a, b))[1] + weights @ found[0]
            assert_equal(step(value, a, b), cross)
            assert_equal(step(lambda a: value(a, a), a), same)

@pytest.mark.parametrize("n, d", [(64, 64), (64, 96), (64, 128), (64, 256), (64, 1024), (256, 64)])
@pytest.mark.parametrize("near_optimum", [False, True])
@pytest.mark.parametrize("name", "vicreg vicreg-contrastive barlow-twins spectral sample-contrastive"
                                 " dimension-contrastive".split())
def test_route_taken_is_as_accurate_as_the_direct(name, n, d, near_optimum, monkeypatch):
    routes, found = (duality.off_diagonal, duality.direct_route), []
    for seed in range(9):
        za, zb = views(n, d, seed, noise=0.05 if near_optimum else 0.5)
        if near_optimum:  # nearly orthogonal dimensions (N >= D) or embeddings (N < D)
            u, _, v = torch.linalg.svd(centered(za), full_matrices=False)
            za, zb = (max(n, d) ** 0.5 * u @ v + 0.02 * z for z in (za, zb))
        exact = step(CRITERIA[name], za.float().double(), zb.float().double())
        for route in routes:
            monkeypatch.setattr(duality, "off_diagonal", route)
            found.append(errors(step(CRITERIA[name], za.float(), zb.float()), exact))
        monkeypatch.undo()
    taken, direct = torch.tensor(found).view(9, 2, 2).median(0).values
    assert (taken <= 2 * direct + 4 * torch.finfo(torch.float32).eps).all(), (taken, direct)

def test_matrix_is_the_smallest(monkeypatch):
    for name in ("vicreg", "barlow-twins", "dimension-contrastive"):
        assert matrix(name, views(8, 16)) == "N x N" and matrix(name, views(16, 8)) == "D x D"
    assert matrix("vicreg-exp", views(8, 16)) == "D x D"
    monkeypatch.setattr(duality, "BLOCK", 15 * 16)
    assert matrix("vicreg-exp", views(8, 16)) == "D x D, blocks"

# --- Every criterion: its formula ---
@every_shape
@pytest.mark.parametrize("other", [{}, OTHER])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_reference(name, other, n, d):
    f, hyperparameters, zs = CRITERIA[name], keywords(name, **other), views(n, d)
    exact = step(PLAIN[name], *zs, **hyperparameters)
    assert_equal(step(f, *zs, **hyperparameters), exact)
    assert_equal(step(lambda *zs: sum(f.terms(*zs, **hyperparameters).values()), *zs), exact)
    assert f is getattr(duality, name.replace("-", "_"))

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 5e-6)])
@pytest.mark.parametrize("n, d", [(32, 80), (64, 24)])
@pytest.mark.parametrize("name, peer", PUBLISHED)
def test_published_code(name, peer, n, d, dtype, tolerance):
    zs = views(n, d, dtype=dtype)
    assert max(errors(step(CRITERIA[name], *zs), step(PUBLISHED[name, peer], *zs))) < tolerance

@every_shape
def test_eq_10_is_vicreg(n, d):
    assert_equal(step(duality.vicreg_contrastive, *views(n, d)), step(duality.vicreg, *views(n, d)))

@every_shape
def test_chain(n, d):
    zs = views(n, d)
    four = [step(CRITERIA[name], *zs) for name in CHAIN]
    for t, exact in enumerate(four):
        assert_equal(step(duality.chain, *zs, t=t), exact)
    assert_equal(step(duality.chain, *zs), [(x + y) / 2 for x, y in zip(four[1], four[2])])
    path = torch.stack([duality.chain(*zs, t=i / 100) for i in range(301)])
    assert path.diff().abs().max() < max(abs(x[0] - y[0]) for x, y in zip(four, four[1:])) / 90  # no jump

@pytest.mark.parametrize("similarity", [lambda x: x, torch.square, torch.abs])
@pytest.mark.parametrize("samples", [8, 4])
@in_blocks
def test_log_sum_exp(similarity, samples, block, monkeypatch):
    monkeypatch.setattr(duality, "BLOCK", block)
    a = views(8, 5)[0]
    rows = [[similarity(x @ y) / 0.3 for j, y in enumerate(a) if (i - j) % samples] for i, x in enumerate(a)]
    exact = [sum(s.exp() for s in row).log() for row in rows]
    assert_equal(duality.log_sum_exp(a, 0.3, samples, similarity), exact)

@pytest.mark.parametrize("name, key, bad", [
    ("simclr", "negatives", "all"), ("simclr", "temperature", 0.0), ("vicreg-exp", "temperature", -1.0),
    ("chain", "t", 3.01), ("chain", "t", -0.01)])
def test_bad_hyperparameter(name, key, bad):
    with pytest.raises(ValueError, match=f"{key}.*{bad}"):
        CRITERIA[name](*views(4, 3), **{key: bad})

# --- Every criterion: its gradient, its symmetries ---
@every_criterion
@pytest.mark.parametrize("n, d", [(6, 3), (3, 6)])
def test_gradcheck(name, n, d, monkeypatch):
    zs = [z.requires_grad_() for z in views(n, d)]
    whole = step(CRITERIA[name], *zs)
    monkeypatch.setattr(duality, "BLOCK", 30)
    assert_equal(step(CRITERIA[name], *zs), whole)
    assert torch.autograd.gradcheck(CRITERIA[name], zs)

@every_criterion
def test_order_of_samples_is_nothing(name):
    for zs in itertools.starmap(views, SHAPES):
        value, *gradients = step(CRITERIA[name], *zs)
        moved = step(CRITERIA[name], *(z.roll(2, 0).flip(0) for z in zs))
        assert_equal(moved, (value, *(g.roll(2, 0).flip(0) for g in gradients)))

@pytest.mark.parametrize("name", PLAIN)
def test_order_of_views_is_nothing(name):
    for za, zb in itertools.starmap(views, SHAPES):
        value, a, b = step(CRITERIA[name], za, zb)
        assert_equal(step(CRITERIA[name], zb, za), (value, b, a))

def rotate_samples(z):  # K -> K Q, Q 1 = 1
    q = torch.linalg.qr(torch.cat((torch.ones(len(z), 1), views(len(z), len(z) - 1)[0]), 1)).Q
    return q @ torch.block_diag(torch.ones(1, 1), rotation(len(z) - 1)) @ q.T @ z

COSINES = {name for name in PLAIN if name.startswith(("simclr", "dcl"))} - {"simclr-standardized"}
COVARIANCES = {"vicreg", "vicreg-contrastive", "vicreg-exp", "barlow-twins", "dimension-contrastive"}
LAWS = {  # what changes nothing in these criteria, and something in all others
    "rotation": (lambda z: z @ rotation(z.shape[1]), COSINES | {"spectral", "tcr", "vicreg-ctr"}),
    "rotation of samples": (rotate_samples, COVARIANCES),
    "translation": (lambda z: z + torch.arange(z.shape[1]),
                    set(PLAIN) - COSINES - {"spectral", "tcr"} | {"simclr-centered"}),
    "lengths": (lambda z: z * torch.arange(1, len(z) + 1)[:, None], COSINES - {"simclr-centered"} | {"tcr"}),
}

@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("law", LAWS)
def test_invariant_or_not(name, law):
    change, invariant = LAWS[law]
    before, after = CRITERIA[name](*views(6, 9)), CRITERIA[name](*map(change, views(6, 9)))
    assert (abs(before - after) < 1e-9 * (1 + abs(before))) == (name in invariant), (before, after)

# --- Every criterion: whatever is put in ---
@every_criterion
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@in_blocks
def test_half_precision(name, dtype, block, monkeypatch):
    monkeypatch.setattr(duality, "BLOCK", block)
    zs = [z.requires_grad_() for z in views(16, 40, dtype=dtype)]
    value, *gradients = step(CRITERIA[name], *(z.detach().float() for z in zs))
    assert value.dtype == torch.float32 and value.ndim == 0
    exact = value, *(g.to(dtype) for g in gradients)
    assert_equal(step(CRITERIA[name], *zs), exact, 0)
    with torch.autocast("cpu", torch.bfloat16):
        loss, l_c = CRITERIA[name](*zs), duality.L_c(zs[0])
    assert_equal((loss, *torch.autograd.grad(loss, zs), l_c), (*exact, duality.L_c(zs[0].float())), 0)

DEGENERATE = {
    "all equal": lambda z: z[:1].expand_as(z),
    "all zero": torch.zeros_like,
    "one zero": lambda z: z * (torch.arange(len(z)) > 0)[:, None],
    "on one line": lambda z: z[:, :1] * z[:1],
    "a dead dimension": lambda z: z * (torch.arange(z.shape[1]) > 0),
    "equal in pairs": lambda z: z[torch.arange(len(z)) // 2],
}

@every_criterion
@pytest.mark.parametrize("kind", DEGENERATE)
@in_blocks
def test_collapsed(name, kind, block, monkeypatch):
    monkeypatch.setattr(duality, "BLOCK", block)
    za, zb = map(DEGENERATE[kind], views(6, 9, dtype=torch.float32))
    for zs in ((za, zb), (za, za), (za.double(), zb.double())):
        for cold in ({}, keywords(name, temperature=0.01)):
            assert all(x.isfinite().all() for x in step(CRITERIA[name], *zs, **cold))

@every_criterion
@every_shape
def test_criteria_compile_whole(name, n, d):
    torch.compiler.reset()
    compiled = torch.compile(CRITERIA[name].terms, backend="aot_eager", fullgraph=True)
    loss = lambda *zs: sum(compiled(*zs).values())
    assert_equal(step(loss, *views(n, d)), step(CRITERIA[name], *views(n, d)))

@every_criterion
@pytest.mark.parametrize("a, b", [
    ((4, 5), (4, 6)), ((4, 5), (5, 5)), ((4,), (4,)), ((2, 3, 4), (2, 3, 4)), ((1, 5), (1, 5)),
    ((4, 0), (4, 0))])
def test_bad_shapes(name, a, b):
    for function in (CRITERIA[name], CRITERIA[name].terms):
        with pytest.raises(ValueError, match=re.escape(f"{a}, {b}")):
            function(torch.randn(a), torch.randn(b))

@every_criterion
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite(name, bad):
    za, zb = views(4, 5)
    worse = zb.index_fill(1, torch.tensor(2), bad)
    for zs in ((za, worse), (worse, za)):
        with pytest.raises(ValueError, match=name.replace("-", "[-_]")):
            CRITERIA[name](*zs)

@every_criterion
@given(st.integers(2, 9), st.integers(1, 12), st.integers(-20, 20), st.integers(-20, 20), st.integers(0, 99),
       st.sampled_from([lambda z: z, *DEGENERATE.values()]))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_finite_or_refused(name, n, d, a, b, seed, kind):
    za, zb = map(kind, views(n, d, seed, dtype=torch.float32))
    za, zb = za * 10.0**a, zb * 10.0**b
    try:
        value, *gradients = step(CRITERIA[name], za, zb)
    except ValueError:
        assert max(a, b) > 8 or d == 1
    else:
        terms = CRITERIA[name].terms(za.double(), zb.double()).values()
        near = abs(value - sum(terms)) <= 1e-4 * (1 + sum(map(abs, terms)))
        assert near or kind in DEGENERATE.values()  # theirs is rounding noise, normalised
        assert all(g.isfinite().all() for g in gradients)

# --- To watch and to distribute ---
@pytest.mark.parametrize("spectrum", [[1.0] * 7, [1.0] + [0.0] * 6, [4.0, 2.0, 1.0, 1.0, 0.5, 0.25, 0.0]])
@pytest.mark.parametrize("n, d", [(7, 7), (7, 20), (20, 7)])
def test_rankme(spectrum, n, d):
    z = rotation(n)[:, :7] * torch.tensor(spectrum) @ rotation(d)[:7]
    entropy = -sum(s / sum(spectrum) * math.log(s / sum(spectrum)) for s in spectrum if s)
    assert duality.diagnose(z)["rankme"].item() == pytest.approx(math.exp(entropy), rel=1e-4)

@every_shape
def test_diagnose(n, d):
    z = views(n, d)[0] + 0.5
    found = {name: value.item() for name, value in duality.diagnose(z).items()}
    dots = off_diagonal(torch.tensor([[x @ y / x.norm() / y.norm() for y in z] for x in z])).tolist()
    stds, norms = [statistics.stdev(k.tolist()) for k in z.T], [x.norm().item() for x in z]
    theorem = (duality.L_c(z) + duality.norms4(z)).item()
    assert found == pytest.approx(dict(
        std_mean=statistics.mean(stds), std_min=min(stds), norm_mean=statistics.mean(norms),
        norm_std=statistics.stdev(norms), L_c=duality.L_c(z).item(), L_nc=duality.L_nc(z).item(),
        theorem_left=theorem, theorem_right=theorem, rankme=found["rankme"],
        negative_mean=statistics.mean(dots), negative_variance=statistics.pvariance(dots)))

@pytest.mark.parametrize("kind", DEGENERATE)
def test_diagnose_collapsed(kind):
    found = duality.diagnose(DEGENERATE[kind](views(6, 9, dtype=torch.float16)[0]))
    assert all(value.isfinite() for value in found.values())
    assert not kind.startswith("all") or found["std_min"] < 1e-9 and found["rankme"] < 1.001

def process(rank, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    halves = [z.chunk(2)[rank] for z in views(8, 5)]
    together = step(lambda *zs: sum(f(*map(duality.gather, zs)) for f in CRITERIA.values()), *halves)
    torch.save(together, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()

def test_gather_is_one_process_with_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    value, *gradients = step(lambda *zs: sum(f(*zs) for f in CRITERIA.values()), *views(8, 5))
    for rank in (0, 1):
        found, *parts = torch.load(tmp_path / f"{rank}.pt")
        # DDP divides by the 2 processes
        assert_equal((found, *(g / 2 for g in parts)), (value, *(g.chunk(2)[rank] for g in gradients)))
    assert duality.gather(found) is found

# --- Views --------------------------------------------------------------------------------------------------
NEUTRAL = dict(brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0, grey=1.0, sigma=1e-3, solarise=2.0)

def views_of(images, size, **wanted):
    """What train.Views makes of uint8 images with these parameters, in [0, 1]."""
    n, _, height, width = images.shape
    recipe = train.Views(size, blur=1.0, solarise=1.0)
    p = {**NEUTRAL, "top": 0.0, "left": 0.0, "height": float(height), "width": float(width), **wanted}
    out = recipe.apply(images, {k: torch.as_tensor(v).expand(n)[:, None] for k, v in p.items()})
    return out * recipe.std + recipe.mean

def pictures(n=4, height=32, width=32):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, height, width), generator=generator, dtype=torch.uint8)
    images[0, :, 0], images[0, 1:, 1], images[0, 2, 2] = 128, 40, images[0, 0, 2]  # greys and equal channels
    return images

@pytest.mark.parametrize("name, values, function", (
    ("brightness", (0.6, 1.0, 1.4, 1.9), lambda x, v: TF.adjust_brightness(x, v)),
    ("contrast", (0.6, 1.0, 1.4, 0.1), lambda x, v: TF.adjust_contrast(x, v)),
    ("saturation", (0.6, 1.0, 1.4, 2.0), lambda x, v: TF.adjust_saturation(x, v)),
    ("hue", (-0.5, -0.1, 0.07, 0.5), lambda x, v: TF.adjust_hue(x, v)),
    ("grey", (0.0, 1.0, 0.0, 1.0), lambda x, v: x if v else TF.rgb_to_grayscale(x, 3)),
    ("solarise", (1.0, 2.0, 1.0, 2.0), lambda x, v: TF.solarize(x, 0.5) if v == 1 else x),
    ("sigma", (0.1, 0.5, 1.0, 2.0), lambda x, v: TF.gaussian_blur(x, 3, v))))
def test_operation_is_torchvisions(name, values, function):
    images = pictures()
    found = views_of(images, 32, **{name: torch.tensor(values)})
    expected = torch.stack([function(x, v) for x, v in zip(images / 255, values)])
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)

@pytest.mark.parametrize("box, height, width, size", (
    ((0, 0, 32, 32), 32, 32, 32), ((3, 5, 20, 17), 32, 32, 32), ((3, 5, 40, 17), 48, 40, 24),
    ((0, 0, 64, 48), 64, 48, 16), ((9, 2, 2, 3), 32, 32, 32), ((31, 0, 1, 1), 32, 32, 16)))
def test_crop_is_torchvisions(box, height, width, size):
    images = pictures(2, height, width)
    top, left, h, w = box
    found = views_of(images, size, top=float(top), left=float(left), height=float(h), width=float(w))
    expected = TF.resized_crop(images / 255, top, left, h, w, [size, size], antialias=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)

@pytest.mark.parametrize("size", (32, 12))
def test_flip_is_torchvisions(size):  # a negative width, from the right edge on
    images = pictures(2)
    found = views_of(images, size, left=torch.tensor([32.0, 27.0]), width=torch.tensor([-32.0, -17.0]))
    expected = [TF.hflip(TF.resized_crop(image / 255, 0, left, 32, width, [size, size], antialias=True))
                for image, left, width in zip(images, (0, 10), (32, 17))]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=5e-6)

def test_blur_reaches_further_in_larger_images():
    images = pictures(2, 64, 64)
    expected = TF.gaussian_blur(images / 255, 7, 1.5)
    torch.testing.assert_close(views_of(images, 64, sigma=1.5), expected, rtol=0, atol=5e-6)

def test_views_are_drawn_for_each_sample_in_the_ranges_set():
    images, recipe = pictures(1).expand(4000, -1, -1, -1), train.Views(32, blur=0.5, solarise=0.3)
    p = recipe.draw(4000, 32, 48, generator=torch.Generator().manual_seed(0))
    assert abs((p["width"] < 0).double().mean() - 0.5) < 0.03  # flipped
    for start, length, side in (("top", "height", 32), ("left", "width", 48)):
        edges = torch.cat((p[start], p[start] + p[length]))
        assert -1e-3 < edges.min() < 0.1 and side - 0.1 < edges.max() < side + 1e-3
    assert (p["top"] >= 0).all() and (p["left"] + p["width"].clamp_max(0)).min() > -1e-5
    area, ratio = p["height"] * p["width"].abs() / (32 * 48), (p["width"].abs() / p["height"]).log()
    square = recipe.draw(4000, 32, 32, generator=torch.Generator().manual_seed(0))
    square_area = square["height"] * square["width"].abs() / 1024
    assert 0.15 < area.min() < 0.25 and area.max() <= 1  # sides that are too long are cut
    assert 0.15 < square_area.min() < 0.25 and square_area.max() <= 1 and abs(square_area.mean() - 0.6) < 0.03
    free = ratio[p["height"] < 31.999]  # not cut; log-uniform between 3/4 and 4/3
    assert -0.288 < free.min() < -0.27 and 0.27 < free.max() < 0.288 and ratio.max() <= math.log(1.5) + 1e-4
    for name, neutral, expected in (("grey", 1, 0.2), ("solarise", 2, 0.3), ("hue", 0, 0.8),
                                    ("brightness", 1, 0.8), ("contrast", 1, 0.8), ("saturation", 1, 0.8)):
        assert abs((p[name] != neutral).double().mean() - expected) < 0.03, name
    assert abs((p["sigma"] > 0.1).double().mean() - 0.5) < 0.03 and p["hue"].abs().max() <= 0.1
    assert 0.6 <= p["brightness"].min() < 0.62 and 1.38 < p["contrast"].max() <= 1.4
    assert 0.8 <= p["saturation"].min() < 0.82
    a, b = (recipe(images[:100], torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert len(a.flatten(1).unique(dim=0)) == 100 and not torch.equal(a, b)
    assert a.shape == (100, 3, 32, 32) and a.dtype == torch.float32 and a.isfinite().all()

def test_shares_of_a_batch_are_the_batch():
    images, recipe = pictures(96), train.Views(32)
    draw = lambda: torch.Generator().manual_seed(5)
    whole = recipe(images, draw())
    parts = [recipe(x, draw(), (rank, 3)) for rank, x in enumerate(images.chunk(3))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-5)
    interleaved = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(recipe(interleaved, draw()), whole, rtol=0, atol=1e-5)

def test_views_are_the_same_under_autocast():
    images, recipe = pictures(3), train.Views(24, blur=0.5)
    outside = recipe(images, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(recipe(images, torch.Generator().manual_seed(0)), outside)

def test_images_without_augmentation_are_themselves():
    images, recipe = pictures(3), train.Views(32, crop=0, flip=0, jitter=0, grey=0)
    torch.testing.assert_close(recipe(images) * recipe.std + recipe.mean, images / 255, rtol=0, atol=1e-6)

def test_shapes_are_labelled_images_that_pixels_do_not_tell():
    (x, y), (test_x, test_y) = train.shapes(1500, 0), train.shapes(800, 1)
    assert x.shape == (1500, 3, 32, 32) and x.dtype == torch.uint8 and y.unique().tolist() == list(range(8))
    assert not torch.equal(x[:800], test_x) and torch.equal(train.shapes(1500, 0)[0], x)
    found, _ = linear_probe(x.flatten(1) / 255, y, test_x.flatten(1) / 255, test_y, 8, epochs=5, lr=1e-3)
    assert found < 30  # of 12.5 by chance

# --- Optimiser and probe ------------------------------------------------------------------------------------
def test_lars_is_its_formula():
    torch.manual_seed(0)
    weights = [torch.randn(5, 4), torch.zeros(3, 3), torch.randn(6)]
    params, lr, eta, decay = [w.clone().requires_grad_() for w in weights], 0.3, 0.02, 1e-2
    groups = [dict(params=params[:2], weight_decay=decay), dict(params=params[2:], adapt=False)]
    optimizer = train.LARS(groups, lr, eta=eta)
    momenta = [torch.zeros_like(w) for w in weights]
    for scale in (1.0, 1e-4, 10.0):
        for i, p in enumerate(params):
            p.grad = scale * torch.randn_like(p)
            g = p.grad + (decay if i < 2 else 0) * weights[i]
            if i < 2 and weights[i].norm() > 0:
                g = g * eta * weights[i].norm() / g.norm()
            momenta[i] = 0.9 * momenta[i] + g
            weights[i] = weights[i] - lr * momenta[i]
        optimizer.step()
        for found, expected in zip(params, weights):
            torch.testing.assert_close(found.detach(), expected)

def test_decay_and_adaptation_spare_biases_and_norms():
    args = train.parse_args("--dataset cifar10 --arch resnet18 --projector 16-8 --batch-size 512".split())
    model = train.Model("resnet18", 32, "16-8", 10)
    main, probe = train.build_optimizers(args, model)
    decayed, spared = (set(map(id, group["params"])) for group in main.param_groups)
    expected = {id(m.weight) for part in (model.encoder, model.projector) for m in part.modules()
                if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))}
    assert decayed == expected and not spared & decayed and main.param_groups[0]["lr"] == pytest.approx(0.2)
    assert len(decayed | spared) == len([*model.encoder.parameters(), *model.projector.parameters()])
    assert main.param_groups[1]["weight_decay"] == 0 and not main.param_groups[1]["adapt"]

def test_learning_rate_rises_then_falls():
    rates = [train.schedule(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)]) and rates[10] == 1
    assert all(a > b for a, b in zip(rates[10:], rates[11:])) and 0 < rates[-1] < 1e-3

def test_projector_is_the_papers():
    layers = train.Model("small", 32, "32-16-8", 10).projector
    assert [type(m).__name__ for m in layers] == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    assert [m.out_features for m in layers[::3]] == [32, 16, 8] and layers[-1].bias is None

def test_small_images_have_a_3x3_stem_without_pooling():
    for size, kernel, pool in ((64, (3, 3), torch.nn.Identity), (65, (7, 7), torch.nn.MaxPool2d)):
        encoder = train.Model("resnet18", size, "8", 4).encoder
        assert encoder.conv1.kernel_size == kernel and type(encoder.maxpool) is pool

def test_probe_sends_no_gradient_back():
    model = train.Model("small", 32, "8", 4)
    model(torch.randn(4, 3, 32, 32))[1].sum().backward()
    assert all(p.grad is None for p in model.encoder.parameters()) and model.probe.weight.grad is not None

def test_knn_and_linear_probe_know_clusters():
    torch.manual_seed(0)
    centres = torch.randn(6, 20)
    y, test_y = torch.arange(600) % 6, torch.arange(120) % 6
    x, test_x = (3 * centres[labels] + 0.1 * torch.randn(len(labels), 20) for labels in (y, test_y))
    assert knn(x, y, test_x, test_y, 6) == 100
    assert linear_probe(x, y, test_x, test_y, 6, epochs=20) == (100, 100)
    assert knn(x, y[torch.randperm(600)], test_x, test_y, 6) < 50

def test_readmes_loss_is_covered_by_the_tests(monkeypatch):
    code = re.search(r"<!-- frossl -->\n```python\n(.*?)```", (HERE / "README.md").read_text(), re.S).group(1)
    monkeypatch.setattr(duality, "CRITERIA", dict(CRITERIA))
    exec(code, space := vars(duality).copy())
    za, zb = (torch.randn(12, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    a, b = spread(za), spread(zb)
    plain = sum(((x.T @ x).square().sum() / 144).log() for x in (a, b)) + (a - b).square().sum() / 12
    torch.testing.assert_close(space["frossl"](za, zb), plain)
    for kind in DEGENERATE.values():
        zs = map(kind, views(6, 9, dtype=torch.float32))
        assert all(x.isfinite().all() for x in step(space["frossl"], *zs))
    assert "frossl" in duality.CRITERIA and "frossl" not in CRITERIA

# --- Other devices ------------------------------------------------------------------------------------------
@pytest.fixture(params=ACCELERATORS or ["meta"])
def same(request, monkeypatch):
    """Checks that function(tensors, device) does there what it does here. Where there is no GPU, a stand-in
    checks places and shapes: its tensors, which have no values, refuse to meet the CPU's."""
    device = torch.device(request.param)
    def check(function, *tensors):
        there, here = (function([x.to(d) for x in tensors], d) for d in (device, torch.device("cpu")))
        for x, y in zip(there, here, strict=True):
            assert x.device.type == device.type and x.dtype == y.dtype and x.shape == y.shape
            if device.type != "meta":
                torch.testing.assert_close(x.cpu(), y, rtol=1e-4, atol=1e-5)
    if device.type == "meta":
        monkeypatch.setattr(torch, "autocast", lambda *args, **keywords: contextlib.nullcontext())
    with FakeTensorMode() if device.type == "meta" else contextlib.nullcontext():
        yield check

@every_criterion
@pytest.mark.parametrize("n, d", [(6, 30), (16, 5)])  # each log-sum-exp once whole, once in blocks
def test_criteria_on_other_devices(name, n, d, monkeypatch, same):
    monkeypatch.setattr(duality, "BLOCK", 200)
    loss = lambda *zs: sum(CRITERIA[name].terms(*zs).values())
    same(lambda zs, device: step(loss, *zs), *views(n, d, dtype=torch.float32))

def test_views_on_other_devices(same):
    recipe = train.Views(24, blur=0.5, solarise=0.5)
    p = recipe.draw(6, 32, 40, generator=torch.Generator().manual_seed(0))
    apply = lambda x, device: [recipe.to(device).apply(x[0], dict(zip(p, x[1:])))]
    same(apply, pictures(6, 32, 40), *p.values())
    same(lambda x, device: [recipe.to(device)(*x)[:, :, 0, 0] * 0], pictures(6, 32, 40))  # drawn there

def test_lars_on_other_devices(same):
    def two_steps(tensors, device):
        params = [x.clone().requires_grad_() for x in tensors]
        optimizer = train.LARS([dict(params=params[:2]), dict(params=params[2:], adapt=False)], 0.3)
        for _ in range(2):
            for p in params:
                p.grad = 1 + p.detach()
            optimizer.step()
        return [p.detach() for p in params]
    same(two_steps, torch.ones(5, 4), torch.zeros(3, 3), torch.ones(6))

# --- Programs -----------------------------------------------------------------------------------------------
TINY = "--image-size 8 --arch small --projector 16 --precision fp32 --device cpu --workers 0"
KILLS = 20 if os.environ.get("DUALITY_LONG") else 3
EPOCHS = 10 * (KILLS + 1)
SCRATCH = tempfile.TemporaryDirectory()

def as_program(line, output, method, largest_file=0, held=True):
    os.setpgrp(), os.dup2(os.open(output, os.O_WRONLY), 1), os.dup2(1, 2)
    multiprocessing.set_start_method(method, force=True)
    if largest_file:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv, train.RESIDENT_BYTES = shlex.split(line), 0
    runpy.run_path(str(HERE / sys.argv[0]), run_name="__main__") if held else train.train(train.parse_args())

def program(line, until=None, number=None, pause=0.0, **options):
    """(exit status, output) of a script of this repository, which gets a signal a pause after until(output).

    Its process, of a group of its own, is forked from one that has imported torch.
    """
    context, output = multiprocessing.get_context("forkserver"), Path(tempfile.mkstemp(dir=SCRATCH.name)[1])
    context.set_forkserver_preload(["pytest", "torchvision", "torch.distributed", "tqdm"])
    args = line, output, multiprocessing.get_start_method()
    process = context.Process(target=as_program, args=args, kwargs=options)
    process.start()
    while until and process.is_alive() and not until(output.read_text()):
        time.sleep(0.005)
    if number:
        time.sleep(pause)
        os.killpg(process.pid, number)
    process.join(300)
    return process.exitcode, output.read_text()

def torchrun(processes, line):
    line = f"-m torch.distributed.run --standalone --nproc-per-node {processes} {line}"
    return subprocess.run([sys.executable, *shlex.split(line)], capture_output=True, text=True, timeout=300)

contents = lambda out: {path.name: path.read_bytes() for path in out.iterdir()}
checkpoint = lambda out: torch.load(out / "checkpoint.pt", weights_only=True)

def steps(out):
    """The log's records of steps, each there once and in order."""
    found = [record for record in map(json.loads, open(out / "log.jsonl")) if "loss" in record]
    assert [record["step"] for record in found] == list(range(len(found)))
    return found

def assert_same_run(found, expected, tolerance=0.0):
    """The same losses and weights; with tolerance 0 to the bit, with the optimisers' states."""
    for x, y in zip(steps(found), steps(expected), strict=True):
        accuracy = x.pop("probe_train") - y.pop("probe_train")  # that may differ by a whole sample
        assert x == pytest.approx(y, rel=tolerance, abs=0) and abs(accuracy) <= 1000 * tolerance
    found, expected = checkpoint(found), checkpoint(expected)
    assert found["step"] == expected["step"]
    for name, weight in expected["state"][0].items():
        assert (found["state"][0][name] - weight).norm() <= tolerance * weight.norm(), name
    if not tolerance:
        torch.testing.assert_close(found["state"], expected["state"], rtol=0, atol=0)

@pytest.fixture
def refused(capsys, monkeypatch):
    """Checks that train.py or eval.py ends with status 2 and one line, which has the words and is given."""
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    def check(line, *words):
        program, *arguments = shlex.split(line)
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(SystemExit) as end:
            (train.main if program == "train.py" else evaluation.main)()
        said = capsys.readouterr().err
        assert end.value.code == 2 and re.fullmatch(rf"{program}: .*\n", said), said
        assert all(word in said for word in words), said
        return said
    return check

@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of two classes, 40 and 16 images of 12 x 10 pixels."""
    root, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(56):
        path = root / ("train" if i < 40 else "test") / ("a class", "второй класс")[i % 2] / f"{i} ä.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 128, (10, 12, 3)) + 127 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root

@pytest.fixture(scope="module")
def run(images):
    """The command that trains on these images, five steps an epoch."""
    line = f"train.py --dataset folder --data-dir {images} --batch-size 8 {TINY}"
    return lambda out, epochs=EPOCHS, more="": f"{line} --out {out} --epochs {epochs} {more}"

# --- Several processes --------------------------------------------------------------------------------------
def gradients(rank=0, world=1, plain=False):
    """{criterion: [loss, *gradients]} of this process's share of 16 samples, by train.py or written out."""
    found = {}
    for name, criterion in duality.CRITERIA.items():
        torch.manual_seed(0)
        model = train.Model("small", 8, "12", 5)
        batch = *3 * torch.randn(2, 16, 3, 8, 8), torch.arange(16) % 5
        *views, labels = (x.chunk(world)[rank] for x in batch)
        if plain:
            (za, a), (zb, b) = (model.double()(view.double()) for view in views)
            loss, scale = criterion(za, zb), 1
            (loss + (F.cross_entropy(a, labels) + F.cross_entropy(b, labels)) / 2).backward()
        else:
            scaler, scale = torch.amp.GradScaler("cpu", init_scale=1024.0), 1024
            net = train.distribute(model, torch.device("cpu"))
            terms, *_ = train.forward_backward(
                net, criterion.terms, {}, views, labels, contextlib.nullcontext, scaler)
            loss = sum(terms.values())
        found[name] = [loss.detach(), *(p.grad / scale for p in model.parameters())]
    return found

class Watch(TorchDispatchMode):
    """Refuses what waits for a device and what Apple's does not have, float64."""
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal"), function
        found = function(*args, **(kwargs or {}))
        assert not tree_any(lambda x: torch.is_tensor(x) and x.dtype == torch.float64, found), function
        return found

@every_criterion
def test_a_step_neither_waits_for_the_device_nor_needs_float64(name, run):
    line = run(".", 1, f"--criterion {name} --optimizer lars --views blur=0.5 solarise=0.2")
    args, scaler = train.parse_args(line.split()[1:]), torch.amp.GradScaler("cpu", enabled=False)
    data, model = train.Data(args, torch.device("cpu")), train.Model("small", 8, "16", 2)
    optimizers, rest = train.build_optimizers(args, model), (contextlib.nullcontext, scaler)
    with Watch():
        for *views, labels in data.batches(0, 2, 2):
            train.forward_backward(model, CRITERIA[name].terms, {}, views, labels, *rest)
            for optimizer in optimizers:
                scaler.step(optimizer)

def assert_close(found, expected, tolerance):
    for name in duality.CRITERIA:
        for x, y in zip(found[name], expected[name], strict=True):
            assert (x - y).norm() < tolerance * y.norm(), (name, x.shape)

def test_a_step_has_the_gradients_of_criterion_and_probe():
    assert_close(gradients(), gradients(plain=True), 1e-4)

@pytest.mark.parametrize("processes", (2, 4))
def test_processes_have_the_gradients_of_one(processes, tmp_path):
    result = torchrun(processes, f"{__file__} --worker gradients --out {tmp_path}")
    assert result.returncode == 0, result.stderr
    for rank in range(processes):
        assert_close(torch.load(tmp_path / f"{rank}.pt"), gradients(), 1e-5)

@pytest.mark.parametrize("optimizer, killed", (("lars --lr 0.3", False), ("adamw --lr 3e-4", True)))
def test_two_processes_train_as_one(optimizer, killed, run, tmp_path):
    line = run(tmp_path, 4, f"--criterion simclr --optimizer {optimizer} --save-every 0 --out {tmp_path}")
    assert program(f"{line}/one")[0] == 0
    if killed:  # the other one ends within a minute, and the run resumes
        result = torchrun(2, f"{__file__} --worker {line}/two")
        assert result.returncode != 0 and time.time() - float((tmp_path / "killed").read_text()) < 60
        assert checkpoint(tmp_path / "two")["step"] == 5
    result = torchrun(2, f"{HERE}/{line}/two")
    assert result.returncode == 0 and result.stderr.count("2 x cpu fp32") == 1, result.stderr
    assert_same_run(tmp_path / "two", tmp_path / "one", 1e-5)

@pytest.mark.parametrize("batch, processes", ((63, 2), (2, 2), (6, 4)))
def test_a_batch_that_does_not_divide_is_refused(batch, processes, refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    refused(f"train.py --dataset shapes --batch-size {batch} {TINY}", f"--batch-size {batch}", str(processes))

def worker(task, *words):
    """What torchrun starts: the gradients, or a run whose second process dies after the first checkpoint."""
    args, accuracy = train.parse_args([*words, "--device", "cpu"]), train.probe_accuracy
    out, rank, world = Path(args.out), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    def dies(*args):
        if rank == 1 and (out / "checkpoint.pt").exists():
            out.with_name("killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return accuracy(*args)
    if task == "gradients":
        train.start(args)
        return torch.save(gradients(rank, world), out / f"{rank}.pt")
    train.probe_accuracy = dies
    train.train(args)

# --- Interrupted runs ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """(folder, seconds of training) of a run that nothing interrupts."""
    out, began = tmp_path_factory.mktemp("whole") / "run", []
    until = lambda said: out.exists() and not began.append(time.time())
    assert program(run(out, more="--save-every 0"), until)[0] == 0
    return out, time.time() - began[0]

def test_killed_runs_go_on_to_the_same_weights(run, whole, tmp_path):
    line, saved, stamp = run(tmp_path / "run", more="--save-every 0"), tmp_path / "run" / "checkpoint.pt", 0
    until = lambda said: saved.exists() and saved.stat().st_mtime_ns != stamp
    for kill in range(KILLS):
        pause = random.uniform(0, whole[1] / (KILLS + 1))
        assert program(line, until, signal.SIGKILL, pause)[0] == -signal.SIGKILL
        stamp = saved.stat().st_mtime_ns
    saved.with_name("checkpoint.pt.part").write_bytes(saved.read_bytes()[:999])  # as if killed while it wrote
    assert checkpoint(saved.parent)["step"] < 5 * EPOCHS and program(line)[0] == 0
    assert_same_run(saved.parent, whole[0])

def test_interrupted_runs_save_and_go_on_to_the_same_weights(run, whole, tmp_path):
    step = 0
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        pause = random.uniform(0, whole[1] / 4)
        found, said = program(run(tmp_path), lambda said: "step/s" in said, number, pause)
        before, step = step, checkpoint(tmp_path)["step"]
        assert found == status and f"after step {step} of" in said and "same command" in said, said
        assert before < step < 5 * EPOCHS and "Traceback" not in said
    assert program(run(tmp_path))[0] == 0
    assert_same_run(tmp_path, whole[0])

def test_an_interrupt_before_the_first_step_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(train, "load", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit) as end:
        train.main(["--dataset", "shapes", "--device", "cpu"])
    assert end.value.code == 130 and re.fullmatch(".*interrupted\n", capsys.readouterr().err)

def test_a_signal_to_all_processes_does_not_end_the_workers_before_the_run(run, tmp_path):
    line = run(tmp_path / "run", 2, "--workers 2")
    status, said = program(line, lambda said: "step/s" in said, signal.SIGTERM, held=False)
    assert status == 143 and 0 < checkpoint(tmp_path / "run")["step"] < 10, said
    assert program(line, held=False)[0] == program(run(tmp_path / "whole", 2), held=False)[0] == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")

@pytest.fixture
def out(whole, tmp_path):
    return Path(shutil.copytree(whole[0], tmp_path / "run"))

@pytest.mark.parametrize("damage", ("empty", "half", "text", "changed", "weights", "nothing"))
def test_a_damaged_checkpoint_is_named_and_nothing_overwritten(damage, out, run, refused):
    path, good = out / "checkpoint.pt", (out / "checkpoint.pt").read_bytes()
    bad = dict(empty=b"", half=good[:len(good) // 2], text=b"text", changed=bytes(99) + good[99:])
    path.write_bytes(bad.get(damage, good))
    if damage in ("weights", "nothing"):
        torch.save({"fc": torch.zeros(2)} if damage == "weights" else {}, path)
    before = contents(out)
    refused(run(out, EPOCHS + 1), "checkpoint.pt is damaged")
    assert contents(out) == before

@pytest.mark.parametrize("more, names", (
    ("--criterion simclr", "criterion"), ("--projector 32", "projector"), ("--arch resnet18", "arch"),
    ("--set covariance=2", "set covariance"), ("--views hue=0", "views hue"), ("--seed 1 --lr 1", "seed lr")))
def test_other_settings_are_refused(more, names, out, run, refused):
    before = contents(out)
    refused(run(out, EPOCHS + 1, more), *names.split())
    assert contents(out) == before

def test_more_epochs_go_on_and_a_complete_run_is_left_alone(out, run):
    before, (status, said) = contents(out), program(run(out))
    assert status == 0 and "complete" in said and contents(out) == before, said
    assert program(run(out, EPOCHS + 1))[0] == 0
    assert len(steps(out)) == 5 * EPOCHS + 5 and contents(out)["log.jsonl"].startswith(before["log.jsonl"])
    (out / "log.jsonl").unlink()
    assert program(run(out, EPOCHS + 2))[0] == 0 and list(map(json.loads, open(out / "log.jsonl")))

@pytest.mark.parametrize("largest_file", (0, 1_000_000, 3_000_000))  # no log, encoder, checkpoint
def test_a_full_disk_leaves_the_checkpoint(largest_file, out, run):
    before = contents(out)
    size = largest_file or len(before["log.jsonl"]) + 9
    status, said = program(run(out, EPOCHS + 1), largest_file=size)
    assert status == 2 and len(re.findall("saved is intact|Traceback|ignored", said)) == 1, said
    assert contents(out)["checkpoint.pt"] == before["checkpoint.pt"] and not list(out.glob("*.part"))
    assert program(run(out, EPOCHS + 1))[0] == 0 and len(steps(out)) == 5 * EPOCHS + 5

def test_a_loss_that_is_not_finite_stops_the_run(run, tmp_path):
    line = run(tmp_path, 9, "--optimizer sgd --warmup 0 --batch-size 40 --lr 1e9")  # an epoch is one step
    assert program(line + " --epochs 1")[0] == 0
    before, (status, said) = contents(tmp_path), program(line)
    assert status == 1 and re.search(r"variance\b.* (nan|inf) at step 1\b", said), said
    assert contents(tmp_path)["checkpoint.pt"] == before["checkpoint.pt"]

def test_weights_that_are_not_finite_are_not_saved(run, tmp_path, monkeypatch, refused):
    def fragile(za, zb):  # whose gradient is 0 / 0 from the eleventh time on, in step 9
        calls.append(za)
        return dict(invariance=F.mse_loss(za, zb), surprise=(0 * za.sum()) ** (0.5 if len(calls) > 10 else 1))
    calls = []
    monkeypatch.setitem(duality.CRITERIA, "fragile", None)
    duality.criterion(fragile)
    with pytest.raises(SystemExit):
        train.train(train.parse_args(run(tmp_path, 4, "--criterion fragile --save-every 0").split()[1:]))
    assert checkpoint(tmp_path)["step"] == 5 and len(calls) == 11

# --- Bad input ----------------------------------------------------------------------------------------------
BAD_FLAGS = """--foo 1; --criterion foo; --dataset foo; --arch foo; --optimizer foo; --precision foo
--device foo; --set foo=1; --set za=1; --set temperature=1; --set covariance=x; --set covariance
--set covariance=nan; --set covariance=inf; --set covariance=1e400; --criterion tcr --set eps=0
--criterion dcl --set negatives=foo; --criterion simclr --set temperature=-1
--criterion simclr --set temperature=0; --criterion chain --set t=nan
--criterion simclr --set temperature=inf; --criterion chain --set t=7; --data-dir .; --epochs 0
--views foo=1; --views image_size=9; --views grey=7; --views crop=-1; --views hue=nan; --views hue=x
--epochs -3; --batch-size 1; --batch-size 0; --batch-size x; --batch-size 2.5; --lr 0; --lr -1; --lr x
--lr nan; --lr inf; --weight-decay -1; --weight-decay nan; --warmup 2; --warmup -1; --save-every -1
--save-every nan; --workers -1; --projector 0; --projector 12--3; --projector abc; --projector 16-
--projector 99999999999; --seed -1; --seed x; --projector 9999999-16; --image-size 4; --image-size 99999"""

@pytest.mark.parametrize("line", re.split("; |\n", BAD_FLAGS))
def test_bad_flags_end_in_one_line(line, refused, tmp_path):
    said = refused(f"train.py --dataset shapes --device cpu --out {tmp_path / 'run'} {line}")
    assert any(word in said for word in re.split("[ =]", line)[-3:-1]) and not list(tmp_path.iterdir()), said

def test_help_says_the_defaults(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["-h"])
    options = re.sub(r"\s+", " ", capsys.readouterr().out.partition("criterion:\n")[2]).split(" --")
    cases = {"default:": [], "shapes": ["--dataset", "shapes"], "imagenet": ["--dataset", "imagenet"],
             "small": ["--arch", "small"]}
    cases = {case: vars(train.parse_args(flags)) for case, flags in cases.items()}
    told = [(option.split()[0].replace("-", "_"), *found) for option in options for found in re.findall(
        f"({'|'.join(cases)})(?: and folder)? ([^ ,;]+)", option[option.find("default:"):])]
    assert len(told) == 24
    for name, case, value in told:
        if name not in ("workers", "out"):  # these depend on the machine and the run
            assert str(cases[case][name]) == value or cases[case][name] == float(value), (name, case)

def test_settings_may_be_given_in_parts():
    args = train.parse_args("--set covariance=2 invariance=5 --views hue=0 --set covariance=4".split())
    assert args.set == dict(covariance=4, invariance=5) and args.views == dict(hue=0)

def test_what_is_not_there_is_named(run, refused, tmp_path, monkeypatch):
    refused(run("/dev/null/run"), "/dev/null/run")
    refused(run(tmp_path, 1, "--batch-size 41"), "--batch-size 41", "40")
    for kind in {"cuda", "mps"}.difference(ACCELERATORS):
        refused(run(tmp_path, 1, f"--device {kind}"), kind, "cpu")
    refused(run(tmp_path, 1, f"--data-dir {tmp_path}/none"), f"{tmp_path}/none", "--data-dir")
    def no_network(*args, **keywords):
        raise urllib.error.URLError("Name or service not known")
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    line = f"train.py --dataset cifar10 --data-dir {tmp_path}"
    refused(line, "--data-dir", "--dataset shapes", "service not known")

@pytest.mark.parametrize("line", (
    "train.py --criterion foo", "eval.py", "eval.py {0}/none", "eval.py {0}", "eval.py {0} --k 0"))
def test_programs_end_in_one_line(line, tmp_path):
    (tmp_path / "checkpoint.pt").write_text("garbage")
    status, said = program(line.format(tmp_path))
    assert status == 2 and re.fullmatch(rf"{line.split()[0]}: .*\n", said), said

@pytest.mark.parametrize("epochs", (1, 12))  # 5 and 60 steps
def test_profiles_save_nothing(epochs, run, tmp_path):
    status, said = program(run(tmp_path / "run", epochs, "--profile"))
    assert status == 0 and "samples/s" in said and not (tmp_path / "run").exists(), said

# --- Folders of images --------------------------------------------------------------------------------------
def read(line):
    return train.Data(train.parse_args(line.split()[1:]), torch.device("cpu"))

@pytest.fixture
def damaged(images, tmp_path):
    """A copy of the folder of images, and the names of its two damaged files."""
    root = Path(shutil.copytree(images, tmp_path / "images"))
    first, second = (root / "train" / "a class" / f"{i} ä.png" for i in (0, 2))
    first.write_text("no image"), second.write_bytes(second.read_bytes()[:100])
    return root, {str(first), str(second)}

def test_images_of_all_kinds_are_read(run, tmp_path):
    colour = Image.new("RGB", (40, 30), (200, 100, 50))
    kinds = {f"{mode}.png": colour.convert(mode) for mode in ("RGB", "L", "RGBA", "LA", "1")}
    kinds.update({"CMYK.jpg": colour.convert("CMYK"), "P.png": colour.quantize(2),
                  "1x1.png": colour.resize((1, 1)), "wide 写真.png": colour.resize((30_000, 1)),
                  "высокий.jpg": colour.resize((1, 30_000))})
    for path in (tmp_path / split / "a class" / name for split in ("train", "val") for name in kinds):
        path.parent.mkdir(parents=True, exist_ok=True)
        kinds[path.name].save(path)
    found = read(run(".", 1, f"--data-dir {tmp_path}")).sets["train"][0]
    for name, image in zip(sorted(kinds), found, strict=True):
        expected = torch.tensor((124, 124, 124) if "L" in name else (200, 100, 50))[:, None, None]
        assert name == "1.png" or (image - expected).abs().max() <= 6, name

@pytest.mark.parametrize("name", ("cifar10", "cifar100"))
def test_cifar_is_read_from_its_archive(name, tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    kind, images, labels = getattr(torchvision.datasets, name.upper()), pictures(8), [*range(8)]
    content = dict(data=images.flatten(1).numpy(), labels=labels, fine_labels=labels, coarse_labels=[0] * 8)
    content[kind.meta["key"]] = [f"class {i}" for i in labels]
    (folder := tmp_path / kind.base_folder).mkdir()
    for file in (*(file for file, _ in kind.train_list + kind.test_list), kind.meta["filename"]):
        (folder / file).write_bytes(pickle.dumps(content))
    data = read(f"train.py --dataset {name} --data-dir {tmp_path}")
    for (found, targets), files in zip(data.sets.values(), (kind.train_list, kind.test_list), strict=True):
        assert torch.equal(found, images.repeat(len(files), 1, 1, 1))
        assert targets.tolist() == labels * len(files)

def test_damaged_images_and_empty_classes_are_named(damaged, run, refused, tmp_path):
    line = run(tmp_path / "run", 1, f"--data-dir {damaged[0]}")
    refused(line, *damaged[1])
    (damaged[0] / "train" / "empty class").mkdir()
    refused(line, "empty class")

def test_streamed_images_replace_the_damaged_and_resume_the_same(damaged, run, monkeypatch):
    monkeypatch.setattr(train, "RESIDENT_BYTES", 0)
    data = [read(run(".", 1, f"--data-dir {damaged[0]} --seed 999999999 --workers {n}")) for n in (0, 2, 0)]
    *batches, resumed = (list(d.batches(first, 10, 5)) for d, first in zip(data, (0, 0, 7)))
    torch.testing.assert_close(batches[0], batches[1], rtol=0, atol=0)
    torch.testing.assert_close(batches[0][7:], resumed, rtol=0, atol=0)
    assert data[0].damaged == data[1].damaged == damaged[1] and not torch.equal(*batches[0][0][:2])
    assert torch.cat([labels for *_, labels in batches[0][:5]]).bincount().tolist() == [20, 20]

# --- Training and evaluation, written out -------------------------------------------------------------------
@pytest.mark.parametrize("held", (True, False))
def test_an_epoch_has_each_image_once_in_two_views_of_it(held, monkeypatch, tmp_path):
    for i, image in enumerate(pictures(20, 40, 24)):
        image[0] = 10 * i  # red tells which it is
        for path in (tmp_path / split / str(i % 2) / f"{i}.png" for split in ("train", "val")):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    if not held:
        monkeypatch.setattr(train, "RESIDENT_BYTES", 0)
    line = f"train.py --dataset folder --data-dir {tmp_path} --batch-size 6 --image-size 8 --workers 0"
    def see(more):  # which images each of three epochs of three steps shows, and all different views of them
        data, shown, seen = read(f"{line} --views flip=0 jitter=0 grey=0 {more}"), [], []
        for *views, labels in data.batches(0, 9, 3):
            first, second = (25.5 * (view * data.views.std + data.views.mean)[:, 0] for view in views)
            which = first.mean((1, 2)).round()
            assert all((x - which[:, None, None]).abs().max() < 0.1 for x in (first, second))
            assert torch.equal(which % 2, labels)
            shown, seen = [*shown, which], [*seen, *views]
        return torch.stack(shown).view(3, 18), torch.cat(seen).flatten(1).unique(dim=0)
    (epochs, pictures_seen), (others, _) = see(""), see("--seed 1")
    assert all(len(epoch.unique()) == 18 for epoch in epochs) and len(pictures_seen) == 108
    assert len(torch.cat((epochs, others)).unique(dim=0)) == 6  # orders
    for crop in (0,) if held else (0, 1):  # one crop of each image, and files are cropped once
        whole = see(f"crop={crop}")
        assert len(whole[1]) == len(whole[0].unique())

@cache
def small_shapes(split):
    seeds = dict(train=range(10), test=range(10, 14))[split]
    images, labels = (torch.cat(column) for column in zip(*(train.shapes(500, seed) for seed in seeds)))
    images = F.interpolate(images / 255, size=8, mode="bilinear", antialias=True)
    return TF.normalize(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), labels

def features_of(model, split):
    """Features, embeddings, logits and labels of the shapes, by a model in evaluation."""
    images, labels = small_shapes(split)
    with torch.no_grad():
        features = model.eval().encoder(images)
        return features, model.projector(features), model.probe(features), labels

@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run's folder; of its plain loop the model, each step's (loss, accuracy), the test accuracies."""
    out, rows, tests = tmp_path_factory.mktemp("plain"), [], []
    line = (f"train.py --dataset shapes {TINY} --projector 32-16 --criterion simclr --set temperature=0.5"
            f" --epochs 4 --batch-size 2500 --optimizer sgd --lr 0.2 --weight-decay 0.01 --warmup 0.2"
            f" --seed 3 --out {out}")
    status, said = program(line)
    assert status == 0, said
    data = read(line)
    torch.manual_seed(3)
    model = train.Model("small", 8, "32-16", 8)
    parameters = [*model.encoder.parameters(), *model.projector.parameters()]
    weights, biases = ([p for p in parameters if (p.ndim > 1) is many] for many in (True, False))
    main = torch.optim.SGD([dict(params=weights, weight_decay=0.01), dict(params=biases)], momentum=0.9)
    probe = torch.optim.AdamW(model.probe.parameters(), 1e-2, weight_decay=0)
    for step, (*views, labels) in enumerate(data.batches(0, 8, 2)):
        for group in main.param_groups:
            group["lr"] = 0.2 * 2500 / 256 * (
                (step + 1) / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / 6)) / 2)
        embeddings, logits = model.train()(torch.cat(views))
        loss, labels = duality.simclr(*embeddings.chunk(2), temperature=0.5), torch.cat((labels, labels))
        (loss + F.cross_entropy(logits, labels)).backward()
        for optimizer in (main, probe):
            optimizer.step()
            optimizer.zero_grad()
        rows.append((loss.item(), (logits.argmax(1) == labels).double().mean().item()))
        if step % 2:
            *_, logits, labels = features_of(model, "test")
            tests.append(100 * (logits.argmax(1) == labels).double().mean().item())
    return out, model, rows, tests

def test_a_run_is_its_plain_loop(plain):
    out, model, rows, tests = plain
    records = list(map(json.loads, open(out / "log.jsonl")))
    found = [(record["loss"], record["probe_train"]) for record in steps(out)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(rows), rtol=1e-4, atol=2e-3)
    assert [r["probe_test"] for r in records if "probe_test" in r] == pytest.approx(tests, abs=0.2)
    weights = checkpoint(out)["state"][0]
    torch.testing.assert_close(weights, dict(model.state_dict()), rtol=1e-3, atol=1e-4)
    for name, weight in torch.load(out / "encoder.pt").items():
        assert torch.equal(weight, weights[f"encoder.{name}"])

@pytest.mark.parametrize("precision", ("bf16", "fp16"))
def test_a_run_in_half_precision_is_near_float32s(precision, run, tmp_path):
    for p in (precision, "fp32"):
        assert program(run(tmp_path / p, 2, f"--precision {p}"))[0] == 0
    found, expected = ([record["loss"] for record in steps(tmp_path / p)] for p in (precision, "fp32"))
    assert found != expected and found[-1] < found[0] - 2
    assert found[:3] == pytest.approx(expected[:3], rel=5e-3)  # then fp16's scaler leaves out steps

@pytest.mark.parametrize("trained", (True, False))
def test_an_evaluation_is_its_plain_one(trained, plain):
    out, model, *_ = plain
    if not trained:
        torch.manual_seed(3)
        model = train.Model("small", 8, "32-16", 8)
    line = f"{out} --device cpu --epochs 3 --k 7 {'' if trained else '--random-init'}"
    found = evaluation.evaluate(out, evaluation.parse_args(shlex.split(line)))
    (x, _, _, y), (test_x, z, _, test_y) = (features_of(model, split) for split in ("train", "test"))
    rank = lambda spectrum: torch.special.entr(spectrum / spectrum.sum()).sum().exp()
    expected = {key: rank(torch.linalg.svdvals(values))
                for key, values in (("rankme", test_x), ("rankme_embeddings", z))}
    votes, near = torch.zeros(2000, 8), (unit(test_x) @ unit(x).T).sort(descending=True)
    for similarity, index in zip(near.values.T[:7], near.indices.T[:7]):
        votes += F.one_hot(y[index], 8) * (similarity / 0.07).exp()[:, None]
    expected["knn_top1"] = 100 * (votes.argmax(1) == test_y).double().mean()
    expected["linear_top1"], expected["linear_top5"] = linear_probe(x, y, test_x, test_y, 8, epochs=3)
    z = unit(z)
    cosines, squares = (z @ z.T)[~torch.eye(2000, dtype=bool)], z.square().sum(0).square().sum()
    expected.update(negative_mean=cosines.mean(), negative_variance_times_d=16 * cosines.var(),
                    norms4_over_least=squares / (2000**2 / 16), norms4_greatest_over_least=16.0)
    for name, value in expected.items():
        share = name.endswith(("top1", "top5"))  # in %, of 2000 images
        assert found[name] == pytest.approx(float(value), rel=1e-3, abs=0.2 if share else 1e-4), name
    assert (found["steps"], found["k"], found["features"], found["embeddings"]) == (8 * trained, 7, 256, 16)

def test_linear_probe_is_softmax_regression():
    torch.manual_seed(0)
    (x, test_x), (y, test_y) = 5 + torch.randn(2, 900, 20), torch.randint(0, 8, (2, 900))
    x[range(900), y], test_x[range(900), test_y] = x[range(900), y] + 1, test_x[range(900), test_y] + 1
    weights = torch.zeros(21, 8, requires_grad=True)
    optimizer = torch.optim.AdamW([weights], weight_decay=1e-4)
    ready = lambda z: F.pad((z - x.mean(0)) / x.std(0), (0, 1), value=1)
    for epoch in range(12):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 + math.cos(math.pi * epoch / 12)) / 2
        optimizer.zero_grad()
        F.cross_entropy(ready(x) @ weights, y).backward()
        optimizer.step()
    ranks = (ready(test_x + 1) @ weights).argsort(1, descending=True) == test_y[:, None]
    expected = [100 * ranks[:, :k].any(1).double().mean().item() for k in (1, 5)]
    assert linear_probe(x, y, test_x + 1, test_y, 8, epochs=12) == pytest.approx(expected, abs=0.3)

# --- From training to evaluation ----------------------------------------------------------------------------
def assert_evaluates(out):
    for flag, name in (("", "eval.json"), ("--random-init", "eval-random-init.json")):
        status, said = program(f"eval.py '{out}' --epochs 5 {flag}")
        assert status == 0 and "Traceback" not in said, said
        result = json.loads((out / name).read_text())
        assert all(0 < result[key] <= 100 for key in ("linear_top1", "linear_top5", "knn_top1")), result
        assert result["linear_top1"] <= result["linear_top5"] and result["rankme"] >= 1

@pytest.mark.parametrize("device", ["cpu", *(f"{kind} --precision auto" for kind in ACCELERATORS)])
def test_train_and_evaluate_shapes_from_the_command_line(device, tmp_path):
    line = f"{HERE}/train.py --dataset shapes --epochs 1 --batch-size 500 {TINY} --out '{tmp_path}/a run'"
    command = [sys.executable, *shlex.split(f"{line} --device {device}")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and f"eval.py {tmp_path}/a run" in result.stderr, result.stderr
    assert_evaluates(tmp_path / "a run")

def test_a_resnets_defaults_lower_the_loss_from_the_start(tmp_path):
    line = "train.py --dataset shapes --arch resnet18 --image-size 8 --epochs 1 --device cpu --precision fp32"
    assert program(f"{line} --out '{tmp_path}'")[0] == 0
    losses = [record["loss"] for record in steps(tmp_path)]
    times = [record["time"] for record in map(json.loads, open(tmp_path / "log.jsonl")) if "time" in record]
    assert set(map(tuple, times)) == {("views", "encoder", "criterion", "optimiser")}, times
    assert max(losses[1:]) < losses[0] and statistics.mean(losses[-4:]) < losses[0] - 1.5, losses

def test_plot(tmp_path, monkeypatch, refused):
    for seed, accuracies in enumerate(([10.0, 30.0, 50.0], [20.0, 50.0])):
        (run := tmp_path / f"{seed}").mkdir()
        settings = vars(train.parse_args(f"--dataset shapes --seed {seed} --set invariance=9".split()))
        torch.save(dict(settings=settings, step=1, log_bytes=0, state=[]), run / "checkpoint.pt")
        lines = [dict(step=0, loss=1.0), *(dict(epoch=i, probe_test=x) for i, x in enumerate(accuracies))]
        (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn, draw = [], matplotlib.axes.Axes.plot
    monkeypatch.setattr(matplotlib.axes.Axes, "plot", lambda *a, **k: drawn.append((a, k)) or draw(*a, **k))
    evaluation.plot([tmp_path / "0", tmp_path / "1"], tmp_path / "picture.png")
    (_, epochs, means, *_), words = drawn[0]
    assert len(drawn) == 1 and list(epochs) == [1, 2] and means.tolist() == [15, 40]
    assert words["label"] == "vicreg invariance=9.0, mean of 2"
    assert Image.open(tmp_path / "picture.png").size == (900, 600)
    run = shlex.quote(str(tmp_path / "0"))
    refused(f"eval.py {run} --plot {run}/picture.what", "--plot", "picture.what", "not supported")
    refused(f"eval.py {run} --plot {run}/none/picture.png", "none/picture.png", "cannot be written")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="2"):
        evaluation.plot([tmp_path / "0"], tmp_path / "other.png")

def test_train_and_evaluate_a_resnet_on_files(run, tmp_path):
    status, said = program(run(tmp_path, 1, "--arch resnet18 --projector 16-8"))
    assert status == 0 and "3x3 stem without max-pool" in said, said
    resnet, weights = torchvision.models.resnet18(), torch.load(tmp_path / "encoder.pt", weights_only=True)
    resnet.conv1, resnet.maxpool = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), torch.nn.Identity()
    missing, unexpected = resnet.load_state_dict(weights, strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"] and not unexpected
    saved = checkpoint(tmp_path)
    saved["settings"]["precision"] = "fp16"  # a GPU's run, evaluated without one
    torch.save(saved, tmp_path / "checkpoint.pt")
    assert_evaluates(tmp_path)

if __name__ == "__main__" and sys.argv[1:2] == ["--worker"]:
    worker(*sys.argv[2:])
