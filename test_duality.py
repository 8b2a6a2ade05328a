"""Tests: `pytest test_duality.py`. What the criteria cost: `python test_duality.py --benchmark`.

Three things stand beside duality.py here. PLAIN restates each criterion from its formula, slowly: loops and
logarithms of sums of exponentials. PUBLISHED restates, operation by operation, the code that people use. Then the
benchmark, and after it the tests, in the order of duality.py.
"""
import argparse
import functools
import inspect
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from unittest import mock

import torch
import torch.nn.functional as F

import duality
from duality import CRITERIA

# --- Plain references: from the formula ---------------------------------------------------------------------
def unit(z):
    return torch.stack([x / x.norm() for x in z])

def centered(z):
    return z - sum(z) / len(z)

def standardized(z):  # dimensions of norm 1
    k = centered(z)
    return k / (k.square().sum(0) + 1e-5 * len(z)).sqrt()

def off_diagonal(m):
    return [m[i, j] for i in range(len(m)) for j in range(len(m)) if i != j]

def plain_vicreg(za, zb, invariance=25.0, variance=25.0, covariance=None, temperature=None, transpose=False):
    loss = invariance * sum((x - y).square().sum() for x, y in zip(za, zb)) / za.numel()
    for z in (za, zb):
        k = centered(z) if transpose else centered(z).T
        c, size = k @ k.T / (k.shape[1] - 1), len(k)
        loss = loss + variance / 2 * sum(F.relu(1 - (c[i, i] + 1e-4).sqrt()) for i in range(size)) / size
        if temperature is None:
            repulsion = sum(c_ij**2 for c_ij in off_diagonal(c))
        else:
            repulsion = sum(torch.stack(off_diagonal(c)).div(temperature).exp().view(size, size - 1).sum(1).log())
        loss = loss + covariance * repulsion / size
    return loss

def plain_vicreg_exp(za, zb, invariance=25.0, variance=25.0, covariance=25.0, temperature=0.1, transpose=False):
    return plain_vicreg(za, zb, invariance, variance, covariance, temperature, transpose)

def plain_contrastive(za, zb, temperature=0.2, negatives="both", s=lambda x: x, prepare=unit, decoupled=False):
    za, zb, loss = prepare(za), prepare(zb), 0
    for x, y in ((za, zb), (zb, za)):
        for i in range(len(x)):
            others = [u[j] for u in ((x, y) if negatives == "both" else (x,)) for j in range(len(x)) if j != i]
            positive = (s(x[i] @ y[i]) / temperature).exp()
            below = sum((s(x[i] @ other) / temperature).exp() for other in others)
            loss = loss - (positive / (below if decoupled else below + positive)).log() / (2 * len(x))
    return loss

def plain_spectral(za, zb, radius=3.0):
    za, zb = ([x * min(radius / x.norm(), 1) for x in z] for z in (za, zb))
    products = torch.stack([torch.stack([x @ y for y in zb]) for x in za])
    return -2 * products.trace() / len(za) + sum(p**2 for p in off_diagonal(products)) / len(za) / (len(za) - 1)

def plain_pair(za, zb, invariance=1.0, repulsion=1.0, by=lambda z: z):
    za, zb = unit(za), unit(zb)
    squares = sum(p**2 for z in (za, zb) for p in off_diagonal(by(z) @ by(z).T))
    return (invariance * (za - zb).square().sum() + repulsion / 2 * squares) / len(za)

def plain_barlow_twins(za, zb, redundancy=0.0051):
    c = standardized(za).T @ standardized(zb)
    return sum((1 - c[j, j]) ** 2 for j in range(len(c))) + redundancy * sum(c_ij**2 for c_ij in off_diagonal(c))

def plain_tcr(za, zb, invariance=1.0, eps=0.5):
    za, zb, (n, d) = unit(za), unit(zb), za.shape
    rate = sum(torch.logdet(torch.eye(d).to(z) + d / (n * eps**2) * z.T @ z) / 2 for z in (za, zb))
    return (invariance * (za - zb).square().sum() - rate / 2) / n

def plain_chain(za, zb, t=1.5):
    return sum(max(0, 1 - abs(t - k)) * PLAIN[name](za, zb) for k, name in enumerate(duality.CHAIN))

PLAIN = {
    "vicreg": functools.partial(plain_vicreg, covariance=1.0),
    "vicreg-contrastive": functools.partial(plain_vicreg, covariance=1.0),
    "vicreg-exp": plain_vicreg_exp,
    "vicreg-ctr": functools.partial(plain_vicreg_exp, transpose=True),
    "simclr": plain_contrastive,
    "simclr-sq": functools.partial(plain_contrastive, s=torch.square),
    "simclr-abs": functools.partial(plain_contrastive, s=torch.abs),
    "simclr-centered": functools.partial(plain_contrastive, prepare=lambda z: unit(centered(z))),
    "simclr-standardized": functools.partial(
        plain_contrastive, prepare=lambda z: standardized(z) * (len(z) / z.shape[1]) ** 0.5),
    "dcl": functools.partial(plain_contrastive, decoupled=True),
    "dcl-sq": functools.partial(plain_contrastive, s=torch.square, decoupled=True),
    "dcl-abs": functools.partial(plain_contrastive, s=torch.abs, decoupled=True),
    "spectral": plain_spectral,
    "barlow-twins": plain_barlow_twins,
    "tcr": plain_tcr,
    "sample-contrastive": plain_pair,
    "dimension-contrastive": functools.partial(plain_pair, by=lambda z: z.T),
    "chain": plain_chain,
}

# --- Published code, restated with the same operations -------------------------------------------------------
def strided(c):  # the official codes' way to the entries off the diagonal; a copy
    return c.flatten()[:-1].view(len(c) - 1, len(c) + 1)[:, 1:].flatten()

def masked(c):  # lightly's; another copy
    return c[~torch.eye(len(c), dtype=torch.bool, device=c.device)]

def published_vicreg(za, zb, repulsion, weight=1.0):
    loss = 25.0 * F.mse_loss(za, zb)
    for z in (za, zb):
        z = z - z.mean(0)
        loss = loss + 25.0 / 2 * F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()
        loss = loss + weight * repulsion(z.T @ z / (len(z) - 1))
    return loss

def naive_log_sum_exp(c, temperature=0.1):
    own = torch.eye(len(c), dtype=torch.bool, device=c.device)
    return (c / temperature).masked_fill(own, -math.inf).logsumexp(1).mean()

def published_barlow_twins(za, zb):
    batch_norm = torch.nn.BatchNorm1d(za.shape[1], affine=False).to(za)
    c = (batch_norm(za).T @ batch_norm(zb)).div_(len(za))
    return torch.diagonal(c).add_(-1).pow_(2).sum() + 0.0051 * strided(c).pow_(2).sum()

def published_simclr(za, zb, temperature=0.2):
    za, zb, n = F.normalize(za), F.normalize(zb), len(za)
    aa, ab, ba, bb = (x @ y.T / temperature for x in (za, zb) for y in (za, zb))
    aa, bb = masked(aa).view(n, n - 1), masked(bb).view(n, n - 1)
    logits = torch.cat((torch.cat((ab, aa), 1), torch.cat((ba, bb), 1)))
    return F.cross_entropy(logits, torch.arange(n, device=za.device).repeat(2))

def published_dcl(za, zb, temperature=0.2):
    za, zb, n, loss = F.normalize(za), F.normalize(zb), len(za), 0
    for x, y in ((za, zb), (zb, za)):
        own, other = x @ x.T / temperature, x @ y.T / temperature
        negatives = torch.cat((masked(own).view(n, n - 1), masked(other).view(n, n - 1)), 1)
        loss = loss + (negatives.logsumexp(1) - other.diagonal()).mean() / 2
    return loss

PUBLISHED = {  # at the defaults of duality.py
    ("vicreg", "official"): lambda za, zb: published_vicreg(za, zb, lambda c: strided(c).pow(2).sum() / len(c)),
    ("vicreg", "lightly"): lambda za, zb: published_vicreg(za, zb, lambda c: masked(c).pow(2).sum() / len(c)),
    ("barlow-twins", "lightly"): published_barlow_twins,  # the official code's operations too
    ("simclr", "lightly"): published_simclr,
    ("dcl", "lightly"): published_dcl,
    ("vicreg-exp", "naive"): lambda za, zb: published_vicreg(za, zb, naive_log_sum_exp, 25.0),
}

# --- The benchmark: needs no more than duality.py does -------------------------------------------------------
def views(n, d, seed=0, noise=0.5, dtype=torch.float64):
    za, zb = torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return za.to(dtype), (za + noise * zb).to(dtype)

def value_and_gradient(function, *zs, **hyperparameters):
    zs = [z.detach().clone().requires_grad_() for z in zs]
    value = function(*zs, **hyperparameters)
    return value.detach(), *torch.autograd.grad(value, zs, materialize_grads=True)

def errors(found, exact):
    """Relative error of the value and of the gradient."""
    pairs = [[torch.cat([t.flatten() for t in part]).double() for part in (r[:1], r[1:])] for r in (found, exact)]
    return [((x - y).norm() / y.norm().clamp_min(1e-300)).item() for x, y in zip(*pairs)]

def seconds(function, device, budget):
    """Median of as many runs as fit, three at least unless they are slow."""
    wait, times = torch.cuda.synchronize if device == "cuda" else lambda: None, []
    while sum(times) < (3 * budget if len(times) < 3 else budget) and len(times) < 50:
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)

def peak_memory(function, device):
    """Most bytes of tensors alive at a time in function(), its results too, beyond those alive before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    stderr, activity = os.dup(2), torch.profiler.ProfilerActivity.CPU
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)  # the profiler reports its own comings and goings there
        try:
            with torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
                function()
            profile.export_chrome_trace(path := os.path.join(folder, "trace.json"))
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        with open(path) as file:
            events = [event for event in json.load(file)["traceEvents"] if event.get("name") == "[memory]"]
    changes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    return max(itertools.accumulate(changes), default=0)

def route(name, leaves):
    """The matrix that a criterion is seen to make."""
    with (mock.patch.object(duality, "dual_route", wraps=duality.dual_route) as dual,
          mock.patch.object(duality, "checkpoint", wraps=duality.checkpoint) as blocks):
        CRITERIA[name](*leaves)
    side = "2N" if name in ("simclr", "dcl") else "N" if dual.called else "D"
    return f"{side} x {side}" + ", blocks" * blocks.called

def products(name, za, zb):
    """The matrix products that cannot be avoided: a matrix in the forward pass, a product with it in the backward."""
    if name in ("simclr", "dcl"):
        both = torch.cat((za, zb))
        return lambda: both @ both.T @ both
    transpose = name == "vicreg-exp" or len(za) >= za.shape[1]  # else the N x N matrix is the smaller
    a, b = (za.T, zb.T) if transpose else (za, zb)
    if name == "barlow-twins" and transpose:
        return lambda: ((c := a @ b.T) @ b, c.T @ a)
    return lambda: (a @ a.T @ a, b @ b.T @ b)

def benchmark(device, sizes, names, budget):
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"Loss and gradient, float32, torch {torch.__version__}, {where}. duality.py | the published code: median ms,"
          "\nMiB at the peak, relative error of value and gradient | the matrix products alone, and duality.py's ms over"
          f" theirs.\n\n{'criterion':12} {'N':>4} {'D':>4} {'matrix':13} {'ms':>6} {'MiB':>4} {'errors':15} |"
          f" {'against':8} {'ms':>6} {'ratio':>5} {'MiB':>4} {'ratio':>5} {'errors':15} | {'ms':>6} {'ratio':>5}", flush=True)
    speeds = {}
    for name, (n, d) in itertools.product(names, sizes):
        if name == "vicreg-exp" and (n, d) != sizes[min(2, len(sizes) - 1)]:
            continue  # its D x D matrix is the same for all N
        leaves = [z.to(device).requires_grad_() for z in views(n, d, dtype=torch.float32)]
        exact = value_and_gradient(CRITERIA[name], *(z.double() for z in leaves))
        for peer, function in [("", CRITERIA[name]), *((p, f) for (c, p), f in PUBLISHED.items() if c == name)]:
            work, found = n * d * (n if name in ("simclr", "dcl") else d), []
            if peer and work > 15 * speeds.get(peer, math.inf) and (n, d) != (256, 8192):
                continue

            def step():
                loss = function(*leaves)
                return loss.detach(), *torch.autograd.grad(loss, leaves)

            start = time.perf_counter()
            mib = peak_memory(lambda: found.extend(step()), device) / 2**20
            took = time.perf_counter() - start
            ms = 1e3 * (took if peer and took > 2 * budget else seconds(step, device, budget))
            accuracy = "{:.1e} {:.1e}".format(*errors(found, exact))
            if peer:
                speeds[peer] = work / ms * 1e3
                print(f"{ours} | {peer:8} {ms:6.1f} {ms / our_ms:5.1f} {mib:4.0f} {mib / our_mib:5.1f} {accuracy}"
                      f" | {floor:6.1f} {our_ms / floor:5.2f}", flush=True)
            else:
                our_ms, our_mib = ms, mib
                floor = 1e3 * seconds(products(name, *(z.detach() for z in leaves)), device, budget)
                ours = f"{name:12} {n:4} {d:4} {route(name, leaves):13} {ms:6.1f} {mib:4.0f} {accuracy}"

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = functools.partial(parser.add_argument, nargs="+", help="default: %(default)s")
    parser.add_argument("--benchmark", action="store_true", required=True)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    add("--criteria", default=["vicreg", "barlow-twins", "simclr", "vicreg-exp"], choices=[c for c, _ in PUBLISHED])
    add("--sizes", default=[f"{n}x{d}" for n in (256, 512, 1024) for d in (512, 2048, 8192)], metavar="NxD")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each measurement of what is not slower")
    args = parser.parse_args()
    benchmark(args.device, [tuple(map(int, size.split("x"))) for size in args.sizes], args.criteria, args.seconds)
    raise SystemExit

# --- The tests ----------------------------------------------------------------------------------------------
import pytest
from hypothesis import given, settings, strategies as st

NAMES = """simclr simclr-sq simclr-abs simclr-centered simclr-standardized dcl dcl-sq dcl-abs spectral barlow-twins
    vicreg vicreg-contrastive vicreg-exp vicreg-ctr tcr sample-contrastive dimension-contrastive chain""".split()
SHAPES = [(8, 5), (5, 12), (12, 12), (6, 30)]
OTHER = dict(invariance=3.0, variance=2.0, covariance=0.7, repulsion=0.3, redundancy=0.1, temperature=0.07,
             negatives="own", radius=1.5, eps=0.3, t=0.3)  # than the defaults
every_criterion = pytest.mark.parametrize("name", CRITERIA)
every_shape = pytest.mark.parametrize("n, d", SHAPES)
blocks_or_not = pytest.mark.parametrize("block", [duality.BLOCK, 20])

def assert_equal(found, exact, tolerance=1e-10):
    for x, y in zip(found, exact, strict=True):
        assert x.shape == y.shape and (x - y).norm() <= tolerance * (1 + y.norm()), (x, y)

def keywords(name, **wanted):
    return {key: wanted[key] for key in inspect.signature(CRITERIA[name]).parameters if key in wanted}

def rotation(n):
    return torch.linalg.qr(views(n, n)[1]).Q

# --- Section 3: the theorem ---
@pytest.mark.parametrize("n, d", [(2, 1), (2, 9), (40, 3), (3, 40), *SHAPES])
def test_theorem_3_3(n, d):
    z, _ = views(n, d)
    l_c, l_nc = (sum(x**2 for x in off_diagonal(k @ k.T)) if len(k) > 1 else 0 for k in (z, z.T))
    assert duality.L_c(z).item() == pytest.approx(l_c)
    assert duality.L_nc(z).item() == pytest.approx(l_nc)
    assert duality.norms4(z).item() == pytest.approx(sum(x.norm() ** 4 for x in z))
    assert (l_nc + sum(k.norm() ** 4 for k in z.T)).item() == pytest.approx((l_c + sum(x.norm() ** 4 for x in z)).item())
    assert (duality.L_nc(z) + duality.norms4(z.T)).item() == pytest.approx(
        (duality.L_c(z) + duality.norms4(z)).item(), rel=1e-12)

@given(st.integers(2, 40), st.integers(2, 40), st.floats(0.1, 10), st.integers(0, 9))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_lemma_3_4_and_corollary_3_4_1(n, d, a, seed):
    z = views(n, d, seed)[0].exp()  # of unlike dimensions
    for k, L, dual in ((z, duality.L_c, duality.L_nc), (z.T, duality.L_nc, duality.L_c)):  # k: what has norm a
        x = a * unit(k)
        low, high = duality.lemma_3_4(*x.shape, a)
        assert low * (1 - 1e-9) <= duality.norms4(x.T) <= high * (1 + 1e-9)
        axis = torch.zeros_like(x)
        axis[:, 0] = a  # collapsed to one axis: the upper bound; all entries alike: the lower
        assert duality.norms4(axis.T).item() == pytest.approx(high)
        assert duality.norms4(torch.full_like(x, a / x.shape[1] ** 0.5).T).item() == pytest.approx(low)
        low, high = duality.corollary_3_4_1(unit(k))
        z_unit = unit(k) if k is z else unit(k).T
        assert low == pytest.approx((dual(z_unit) - len(x) + len(x) ** 2 / x.shape[1]).item(), abs=1e-9)
        assert low - 1e-9 <= L(z_unit) <= high + 1e-9
        assert (high - low).item() == pytest.approx(len(x) ** 2 - len(x) ** 2 / x.shape[1])

@every_shape
def test_rows_and_columns_of_like_norm(n, d):
    z = views(n, d)[0]
    for _ in range(2000):  # Sinkhorn's iteration
        z = z / z.norm(dim=1, keepdim=True)
        z = z / z.norm(dim=0) * (n / d) ** 0.5
    # sum_j ||K_j||^4 is at the lower bound N^2 / M; with N = M, L_nc = L_c + N - M
    assert duality.norms4(z.T).item() == pytest.approx(n**2 / d)
    assert duality.L_nc(z).item() == pytest.approx((duality.L_c(z) + n - n**2 / d).item())
    assert duality.L_c(z) > 0.1

def test_module_shows_the_theorem():
    shown = subprocess.run([sys.executable, duality.__file__], capture_output=True, text=True, check=True).stdout
    assert all(name in shown for name in duality.CHAIN)

# --- Two routes to one value ---
@pytest.mark.parametrize("n, d", [(2, 9), (40, 3), (3, 40), *SHAPES])
def test_routes_are_equal(n, d):
    za, zb = views(n, d)
    for a, b in ((za, zb), (za.T, zb.T)):
        for part in (duality.direct_route, duality.dual_route, duality.off_diagonal):
            cross = value_and_gradient(lambda x, y: part(x, y, (x * y).sum(1)), a, b)
            assert_equal(cross, value_and_gradient(lambda x, y: sum(s**2 for s in off_diagonal(x @ y.T)), a, b))
            same = value_and_gradient(lambda x: part(x, x, x.square().sum(1)), a)
            assert_equal(same, value_and_gradient(lambda x: sum(s**2 for s in off_diagonal(x @ x.T)), a))

@pytest.mark.parametrize("n, d", [(64, 64), (64, 96), (64, 128), (64, 256), (64, 1024), (256, 64)])
@pytest.mark.parametrize("near_optimum", [False, True])
@pytest.mark.parametrize("name", ["vicreg", "vicreg-contrastive", "barlow-twins", "spectral", "sample-contrastive",
                                  "dimension-contrastive"])
def test_the_cheap_route_is_as_accurate(name, n, d, near_optimum, monkeypatch):
    parts, found = (duality.off_diagonal, duality.direct_route), []
    for seed in range(9):
        za, zb = views(n, d, seed, noise=0.05 if near_optimum else 0.5)
        if near_optimum:  # dimensions (N >= D) or embeddings (N < D) nearly orthogonal
            u, _, v = torch.linalg.svd(za - za.mean(0), full_matrices=False)
            za, zb = max(n, d) ** 0.5 * u @ v + 0.02 * za, max(n, d) ** 0.5 * u @ v + 0.02 * zb
        za, zb = za.float(), zb.float()
        exact = value_and_gradient(CRITERIA[name], za.double(), zb.double())
        for part in parts:
            monkeypatch.setattr(duality, "off_diagonal", part)
            found.append(errors(value_and_gradient(CRITERIA[name], za, zb), exact))
        monkeypatch.setattr(duality, "off_diagonal", parts[0])
    taken, direct = torch.tensor(found).view(9, 2, 2).median(0).values
    assert (taken <= 2 * direct + 4 * torch.finfo(torch.float32).eps).all(), (taken, direct)

# --- Every criterion: its formula ---
@pytest.mark.parametrize("name", NAMES)
def test_registered_under_both_names(name):
    assert CRITERIA[name] is getattr(duality, name.replace("-", "_"))
    assert name in PLAIN

@every_shape
@pytest.mark.parametrize("other", [{}, OTHER, {"negatives": "own"}])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_reference(name, other, n, d):
    zs, hyperparameters = views(n, d), keywords(name, **other)
    exact = value_and_gradient(PLAIN[name], *zs, **hyperparameters)
    assert_equal(value_and_gradient(CRITERIA[name], *zs, **hyperparameters), exact)
    assert_equal(value_and_gradient(lambda *zs: sum(CRITERIA[name].terms(*zs, **hyperparameters).values()), *zs), exact)

@pytest.mark.parametrize("n, d", [(32, 80), (64, 24)])
@pytest.mark.parametrize("name, peer", PUBLISHED)
def test_published_code(name, peer, n, d):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 3e-6)):
        zs = views(n, d, dtype=dtype)
        found, exact = (value_and_gradient(f, *zs) for f in (CRITERIA[name], PUBLISHED[name, peer]))
        assert_equal(found, exact, tolerance)
        assert max(errors(found, [x.double() for x in exact])) < 3 * tolerance

@pytest.mark.parametrize("n, d", [*SHAPES, (64, 24), (24, 64)])
def test_eq_10_is_vicreg(n, d):
    zs = views(n, d)
    assert_equal(*(value_and_gradient(f, *zs) for f in (duality.vicreg_contrastive, duality.vicreg)))

@every_shape
def test_chain(n, d):
    zs = views(n, d)
    ends = [value_and_gradient(CRITERIA[name], *zs) for name in duality.CHAIN]
    for t, end in enumerate(ends):
        assert_equal(value_and_gradient(duality.chain, *zs, t=t), end)
    half_way = [(x + y) / 2 for x, y in zip(ends[1], ends[2])]
    assert_equal(value_and_gradient(duality.chain, *zs, t=1.5), half_way)
    path = torch.stack([duality.chain(*zs, t=3 * i / 300) for i in range(301)])
    furthest = max(abs(x[0] - y[0]) for x, y in zip(ends, ends[1:]))
    assert path.diff().abs().max() < furthest / 90  # no jumps
    for t in (-0.01, 3.01, math.nan):
        with pytest.raises(ValueError, match="t must be"):
            duality.chain(*zs, t=t)

@pytest.mark.parametrize("similarity", [lambda x: x, torch.square, torch.abs])
@pytest.mark.parametrize("samples", [8, 4])
@blocks_or_not
def test_log_sum_exp(similarity, samples, block, monkeypatch):
    monkeypatch.setattr(duality, "BLOCK", block)
    a = views(8, 5)[0]
    rows = [[similarity(x @ y) / 0.3 for j, y in enumerate(a) if (i - j) % samples] for i, x in enumerate(a)]
    assert_equal(duality.log_sum_exp(a, 0.3, samples, similarity), [sum(s.exp() for s in row).log() for row in rows])
    for bad in ((a[:1], 0.3), (a, 0.0), (a, -1.0), (a, math.nan)):
        with pytest.raises(ValueError, match="log-sum-exp"):
            duality.log_sum_exp(*bad)

def test_negatives_are_both_or_own():
    with pytest.raises(ValueError, match="'all'"):
        duality.simclr(*views(4, 3), negatives="all")

# --- Every criterion: its gradient and its symmetries ---
@every_criterion
@pytest.mark.parametrize("n, d", [(6, 4), (4, 9)])
@blocks_or_not
def test_gradcheck(name, n, d, block, monkeypatch):
    zs = views(n, d)
    whole = value_and_gradient(CRITERIA[name], *zs)
    monkeypatch.setattr(duality, "BLOCK", block)
    assert_equal(value_and_gradient(CRITERIA[name], *zs), whole)
    assert torch.autograd.gradcheck(CRITERIA[name], [z.requires_grad_() for z in zs])

@every_criterion
@every_shape
def test_order_of_samples_is_nothing(name, n, d):
    zs, order = views(n, d), torch.randperm(n, generator=torch.Generator().manual_seed(0))
    value, *gradients = value_and_gradient(CRITERIA[name], *zs)
    assert_equal(value_and_gradient(CRITERIA[name], *(z[order] for z in zs)), (value, *(g[order] for g in gradients)))

@pytest.mark.parametrize("name", PLAIN)
def test_order_of_views_is_nothing(name):
    zs = views(6, 9)
    value, a, b = value_and_gradient(CRITERIA[name], *zs)
    assert_equal(value_and_gradient(CRITERIA[name], *zs[::-1]), (value, b, a))

def rotate_samples(z):  # z -> Q z, Q 1 = 1
    q = torch.linalg.qr(torch.cat((torch.ones(len(z), 1).to(z), views(len(z), len(z) - 1)[1]), 1)).Q
    return q @ torch.block_diag(torch.ones(1, 1).to(z), rotation(len(z) - 1)) @ q.T @ z

COSINES = {name for name in NAMES if name.startswith(("simclr", "dcl"))} - {"simclr-standardized"}
VICREG, CENTERED = {"vicreg", "vicreg-contrastive", "vicreg-exp"}, {"simclr-centered", "simclr-standardized"}
LAWS = {  # what leaves which criteria as they are, and changes all others
    "rotation of the embeddings": (lambda z: z @ rotation(z.shape[1]),
                                   COSINES | {"spectral", "tcr", "sample-contrastive", "vicreg-ctr"}),
    "its dual, mean kept": (rotate_samples, VICREG | {"barlow-twins"}),
    "translation": (lambda z: z + torch.arange(z.shape[1]),
                    VICREG | CENTERED | {"vicreg-ctr", "chain", "barlow-twins"}),
    "each embedding's length": (lambda z: z * torch.arange(1, len(z) + 1)[:, None],
                                COSINES - {"simclr-centered"} | {"tcr", "sample-contrastive", "dimension-contrastive"}),
    "order of the dimensions": (lambda z: z.flip(1), set(NAMES)),
    "doubling": (lambda z: 2e3 * z, COSINES | {"tcr", "sample-contrastive", "dimension-contrastive"}),
}

@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("law", LAWS)
def test_invariant_or_not(name, law):
    change, invariant = LAWS[law]
    zs = views(6, 9)
    before, after = CRITERIA[name](*zs), CRITERIA[name](*map(change, zs))
    assert (abs(before - after) < 1e-9 * (1 + abs(before))) == (name in invariant), (before, after)

# --- Every criterion: whatever is put in ---
@every_criterion
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@blocks_or_not
def test_half_precision(name, dtype, block, monkeypatch):
    monkeypatch.setattr(duality, "BLOCK", block)
    zs = views(16, 40, dtype=dtype)
    value, *gradients = value_and_gradient(CRITERIA[name], *(z.float() for z in zs))
    assert value.dtype == torch.float32 and value.shape == ()
    assert_equal(value_and_gradient(CRITERIA[name], *zs), (value, *(g.to(dtype) for g in gradients)), 0)
    half = [z.requires_grad_() for z in zs]
    with torch.autocast("cpu", torch.bfloat16):
        loss = CRITERIA[name](*half)
    assert_equal((loss, *torch.autograd.grad(loss, half)), (value, *(g.to(dtype) for g in gradients)), 0)

def test_theorem_in_half_precision():
    z = views(16, 40, dtype=torch.float16)[0]
    with torch.autocast("cpu", torch.bfloat16):
        for function in (duality.L_c, duality.L_nc, duality.norms4):
            assert function(z) == function(z.float()) and function(z).dtype == torch.float32

DEGENERATE = {
    "all equal": lambda z: z[:1].expand_as(z),
    "all zero": torch.zeros_like,
    "one zero": lambda z: z * (torch.arange(len(z)) > 0)[:, None],
    "on one line": lambda z: z[:, :1] * z[:1],
    "a dead dimension": lambda z: z * (torch.arange(z.shape[1]) > 0),
    "alike in pairs": lambda z: z[torch.arange(len(z)) // 2],
}

@every_criterion
@pytest.mark.parametrize("kind", DEGENERATE)
@blocks_or_not
def test_collapsed(name, kind, block, monkeypatch):
    monkeypatch.setattr(duality, "BLOCK", block)
    za, zb = views(6, 9, dtype=torch.float32)
    for zs in ((za, zb), (za, za), (za.double(), zb.double())):
        for hyperparameters in ({}, keywords(name, temperature=0.01)):
            results = value_and_gradient(CRITERIA[name], *map(DEGENERATE[kind], zs), **hyperparameters)
            assert all(x.isfinite().all() for x in results)

@every_criterion
@pytest.mark.parametrize("a, b", [((4, 5), (4, 6)), ((4, 5), (5, 5)), ((4,), (4,)), ((2, 3, 4), (2, 3, 4)), ((1, 5), (1, 5))])
def test_bad_shapes(name, a, b):
    for function in (CRITERIA[name], CRITERIA[name].terms):
        with pytest.raises(ValueError, match=re.escape(f"{a} and {b}")):
            function(torch.randn(a), torch.randn(b))

@every_criterion
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite(name, bad):
    for which in (0, 1):
        zs = views(4, 5)
        zs[which][1, 2] = bad
        with pytest.raises(ValueError, match=name.replace("-", "[-_]")):
            CRITERIA[name](*zs)

@every_criterion
@given(st.integers(2, 9), st.integers(1, 12), st.lists(st.integers(-20, 20), min_size=2, max_size=2),
       st.sampled_from([lambda z: z, *DEGENERATE.values()]), st.integers(0, 99))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_finite_or_refused(name, n, d, powers, kind, seed):
    zs = [kind(z) * 10.0**power for z, power in zip(views(n, d, seed, dtype=torch.float32), powers)]
    try:
        results = value_and_gradient(CRITERIA[name], *zs)
    except ValueError:
        assert max(powers) > 8 or d == 1
    else:
        assert all(x.isfinite().all() for x in results)

# --- To watch and to distribute ---
def test_rankme():
    for spectrum in ([1.0] * 7, [1.0] + [0.0] * 6, [4.0, 2.0, 1.0, 1.0, 0.5, 0.25, 0.0]):
        p = [s / sum(spectrum) for s in spectrum]
        entropy = -sum(x * math.log(x) for x in p if x)
        for n, d in ((7, 7), (7, 20), (20, 7)):
            z = rotation(n)[:, :7] @ torch.diag(torch.tensor(spectrum)).double() @ rotation(d)[:7] * 3
            assert duality.diagnose(z)["rankme"].item() == pytest.approx(math.exp(entropy), rel=1e-4)

@pytest.mark.parametrize("n, d", SHAPES)
def test_diagnose(n, d):
    z = views(n, d)[0] + 0.5
    found = {name: value.item() for name, value in duality.diagnose(z).items()}
    dots = [(x @ y / x.norm() / y.norm()).item() for i, x in enumerate(z) for j, y in enumerate(z) if i != j]
    stds, norms = [statistics.stdev(k.tolist()) for k in z.T], [x.norm().item() for x in z]
    assert found.pop("rankme") > 1
    assert found.pop("theorem_left") == pytest.approx(found["theorem_right"], rel=1e-12)
    assert found == pytest.approx(dict(
        std_mean=statistics.mean(stds), std_min=min(stds), norm_mean=statistics.mean(norms),
        norm_std=statistics.stdev(norms), L_c=duality.L_c(z).item(), L_nc=duality.L_nc(z).item(),
        theorem_right=(duality.L_c(z) + duality.norms4(z)).item(),
        negative_mean=statistics.mean(dots), negative_variance=statistics.pvariance(dots)))

@pytest.mark.parametrize("kind", DEGENERATE)
def test_diagnose_collapsed(kind):
    found = duality.diagnose(DEGENERATE[kind](views(6, 9, dtype=torch.float16)[0]))
    assert all(value.isfinite() for value in found.values())
    if kind in ("all equal", "all zero"):
        assert found["std_min"] < 1e-12 and found["rankme"].item() == pytest.approx(1, abs=1e-3)

def gathering(rank, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    halves = [z.chunk(2)[rank].clone().requires_grad_() for z in views(8, 5)]
    loss = sum(f(*map(duality.gather, halves)) for f in CRITERIA.values())
    torch.save((loss.detach(), *torch.autograd.grad(loss, halves)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()

def test_gather(tmp_path):
    zs = views(8, 5)
    assert duality.gather(zs[0]) is zs[0]
    torch.multiprocessing.spawn(gathering, (str(tmp_path),), nprocs=2)
    value, *gradients = value_and_gradient(lambda *zs: sum(f(*zs) for f in CRITERIA.values()), *zs)
    for rank in (0, 1):  # DDP divides by the 2 processes
        found, *parts = torch.load(tmp_path / f"{rank}.pt")
        assert_equal((found, *(g / 2 for g in parts)), (value, *(g.chunk(2)[rank] for g in gradients)))
