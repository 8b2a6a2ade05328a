"""Tests: `pytest test_duality.py`. What the criteria cost: `python test_duality.py --benchmark`.

PLAIN computes each criterion slowly, straight from its formula. PUBLISHED restates the code that
people use, with the same operations. Then come the benchmark and the tests, in the order of
duality.py and train.py.
"""

import argparse
import atexit
import concurrent.futures
import contextlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
from functools import cache, partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any
from torchvision import transforms

import duality
import eval as evaluation
import train
from duality import CRITERIA

try:  # the tests need these packages, the benchmark does not
    import matplotlib.axes
    import pytest
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:
    if __name__ != "__main__":
        raise

# --- Plain references: each criterion from its formula -------------------------------------------


def identity(x):
    return x


def unit(z):
    """Embeddings scaled to norm 1."""
    return z / z.norm(dim=1, keepdim=True)


def centered(z):
    return z - z.mean(0)


def standardized(z):
    variance = centered(z).square().mean(0)
    return centered(z) / (variance + 1e-5).sqrt()


def spread(z):
    """Centred dimensions scaled to norm sqrt(N / D)."""
    n, d = z.shape
    return unit(centered(z).T).T * (n / d) ** 0.5


def off_diagonal(matrix):
    """The entries off the diagonal, row by row."""
    n = len(matrix)
    return torch.stack([matrix[i, j] for i in range(n) for j in range(n) if i != j])


def plain_vicreg(
    za, zb, invariance=25.0, variance=25.0, covariance=1.0, temperature=None, transpose=False
):
    loss = invariance * (za - zb).square().sum() / za.numel()
    for z in (za, zb):
        k = centered(z) if transpose else centered(z).T
        size = len(k)
        c = k @ k.T / (k.shape[1] - 1)
        hinge = F.relu(1 - (c.diagonal() + 1e-4).sqrt())
        others = off_diagonal(c).view(size, size - 1)
        if temperature:
            repulsion = (others / temperature).exp().sum(1).log()
        else:
            repulsion = others.square().sum(1)
        loss = loss + (variance / 2 * hinge.sum() + covariance * repulsion.sum()) / size
    return loss


def plain_contrastive(
    za, zb, temperature=0.2, negatives="both", similarity=identity, prepare=unit, decoupled=False
):
    def score(u, v):
        return (similarity(u @ v) / temperature).exp()

    za, zb = prepare(za), prepare(zb)
    n = len(za)
    loss = 0
    for x, y in ((za, zb), (zb, za)):
        for i in range(n):
            others = [x[j] for j in range(n) if j != i]
            if negatives == "both":
                others += [y[j] for j in range(n) if j != i]
            positive = score(x[i], y[i])
            denominator = sum(score(x[i], other) for other in others)
            if not decoupled:
                denominator = denominator + positive
            loss = loss - (positive / denominator).log() / (2 * n)
    return loss


def plain_spectral(za, zb, radius=3.0):
    za, zb = (torch.stack([x * min(radius / x.norm(), 1) for x in z]) for z in (za, zb))
    return -2 * (za * zb).sum(1).mean() + off_diagonal(za @ zb.T).square().mean()


def plain_barlow_twins(za, zb, redundancy=0.0051):
    c = standardized(za).T @ standardized(zb) / len(za)
    return (1 - c.diagonal()).square().sum() + redundancy * off_diagonal(c).square().sum()


def plain_tcr(za, zb, invariance=1.0, eps=0.5):
    za, zb = unit(za), unit(zb)
    n, d = za.shape
    rate = 0
    for z in (za, zb):
        rate = rate + torch.logdet(torch.eye(d) + d / (n * eps**2) * z.T @ z) / 2
    return (invariance * (za - zb).square().sum() - rate / 2) / n


def plain_sample_contrastive(za, zb, invariance=25.0, repulsion=1.0, transpose=False):
    za, zb = spread(za), spread(zb)
    squares = 0
    for z in (za, zb):
        k = z.T if transpose else z
        squares = squares + off_diagonal(k @ k.T).square().sum()
    return (invariance * (za - zb).square().sum() + repulsion / 2 * squares) / len(za)


CHAIN = ["vicreg", "vicreg-exp", "vicreg-ctr", "simclr"]


def plain_chain(za, zb, t=1.5):
    loss = 0
    for k, name in enumerate(CHAIN):
        loss = loss + max(0, 1 - abs(t - k)) * PLAIN[name](za, zb)
    return loss


PLAIN = {
    "vicreg": plain_vicreg,
    "vicreg-contrastive": plain_vicreg,
    "vicreg-exp": partial(plain_vicreg, covariance=25.0, temperature=0.1),
    "vicreg-ctr": partial(plain_vicreg, covariance=25.0, temperature=0.2, transpose=True),
    "simclr": plain_contrastive,
    "dcl": partial(plain_contrastive, decoupled=True),
    "simclr-sq": partial(plain_contrastive, similarity=torch.square),
    "simclr-abs": partial(plain_contrastive, similarity=torch.abs),
    "dcl-sq": partial(plain_contrastive, similarity=torch.square, decoupled=True),
    "dcl-abs": partial(plain_contrastive, similarity=torch.abs, decoupled=True),
    "simclr-centered": partial(plain_contrastive, prepare=lambda z: unit(centered(z))),
    "simclr-standardized": partial(plain_contrastive, prepare=spread),
    "spectral": plain_spectral,
    "barlow-twins": plain_barlow_twins,
    "tcr": plain_tcr,
    "sample-contrastive": plain_sample_contrastive,
    "dimension-contrastive": partial(plain_sample_contrastive, transpose=True),
    "chain": plain_chain,
}

# --- Published code, with the same operations ----------------------------------------------------


def diagonal_mask(matrix):
    return torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)


def off_diagonal_by_mask(matrix):
    """How lightly takes the entries off the diagonal."""
    return matrix[~diagonal_mask(matrix)]


def off_diagonal_by_stride(matrix):
    """How the official implementations take them."""
    n = len(matrix)
    return matrix.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten()


def official_covariance_loss(c):
    return off_diagonal_by_stride(c).pow(2).sum() / len(c)


def lightly_covariance_loss(c):
    return off_diagonal_by_mask(c).pow(2).sum() / len(c)


def naive_log_sum_exp(c):
    return (c / 0.1).masked_fill(diagonal_mask(c), -math.inf).logsumexp(1).mean()


def published_vicreg(za, zb, repulsion=official_covariance_loss, weight=1.0):
    loss = 25.0 * F.mse_loss(za, zb)
    for z in (za, zb):
        z = z - z.mean(0)
        loss = loss + 25.0 / 2 * F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()
        loss = loss + weight * repulsion(z.T @ z / (len(z) - 1))
    return loss


def published_barlow_twins(za, zb):
    batch_norm = torch.nn.BatchNorm1d(za.shape[1], affine=False).to(za)
    c = (batch_norm(za).T @ batch_norm(zb)).div_(len(za))
    invariance = c.diagonal().add_(-1).pow_(2).sum()
    return invariance + 0.0051 * off_diagonal_by_stride(c).pow_(2).sum()


def published_simclr(za, zb, temperature=0.2):
    za, zb = F.normalize(za), F.normalize(zb)
    n = len(za)
    logits = []
    for x, y in ((za, zb), (zb, za)):
        other_view = x @ y.T / temperature
        own_view = off_diagonal_by_mask(x @ x.T / temperature).view(n, n - 1)
        logits.append(torch.cat((other_view, own_view), 1))
    return F.cross_entropy(torch.cat(logits), torch.arange(n, device=za.device).repeat(2))


def published_dcl(za, zb, temperature=0.2):
    za, zb = F.normalize(za), F.normalize(zb)
    n = len(za)
    loss = 0
    for x, y in ((za, zb), (zb, za)):
        own_view, other_view = x @ x.T / temperature, x @ y.T / temperature
        negatives = [off_diagonal_by_mask(s).view(n, n - 1) for s in (own_view, other_view)]
        positives = other_view[diagonal_mask(other_view)]
        loss = loss + (torch.cat(negatives, 1).logsumexp(1) - positives).mean() / 2
    return loss


PUBLISHED = {  # by criterion and author, with duality.py's default hyperparameters
    ("vicreg", "official"): published_vicreg,
    ("vicreg", "lightly"): partial(published_vicreg, repulsion=lightly_covariance_loss),
    ("barlow-twins", "lightly"): published_barlow_twins,  # the official code does the same
    ("simclr", "lightly"): published_simclr,
    ("dcl", "lightly"): published_dcl,
    ("vicreg-exp", "naive"): partial(published_vicreg, repulsion=naive_log_sum_exp, weight=25.0),
}

# --- The benchmark -------------------------------------------------------------------------------


def two_views(n, d, seed=0, noise=0.5, dtype=torch.float64):
    """Random embeddings of n samples, and the same with noise added."""
    generator = torch.Generator().manual_seed(seed)
    za, zb = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    return za.to(dtype), (za + noise * zb).to(dtype)


def value_and_gradients(function, *zs, **hyperparameters):
    """(value, gradient for each of zs)."""
    zs = [z if z.requires_grad else z.clone().requires_grad_() for z in zs]
    value = function(*zs, **hyperparameters)
    return value.detach(), *torch.autograd.grad(value, zs, materialize_grads=True)


def flattened(tensors):
    return torch.cat([t.flatten().double() for t in tensors])


def relative_error(found, exact):
    x, y = flattened(found), flattened(exact)
    return ((x - y).norm() / y.norm().clamp_min(1e-300)).item()


def relative_errors(found, exact):
    """Of two results of value_and_gradients: the value's error, and all gradients' together."""
    return [relative_error(found[:1], exact[:1]), relative_error(found[1:], exact[1:])]


def wait_for(device):
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(run, device):
    wait_for(device)
    start = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - start


def median_ms(runs, device, budget):
    """The median time of each run. They take turns, so that the machine's load hits all alike."""
    times = [[seconds_of(run, device)] for run in runs]
    while sum(map(sum, times)) < budget * len(runs) and len(times[0]) < 50:
        for run, own_times in zip(runs, times):
            if own_times[0] < 0.1:
                run()  # fills the caches, which hold another run's data
            if own_times[0] < 2:  # slower ones are timed only once
                own_times.append(seconds_of(run, device))
    return [1e3 * statistics.median(own_times[1:] or own_times) for own_times in times]


@contextlib.contextmanager
def silent_stderr():
    stderr = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def run_with_peak_mib(run, device):
    """run()'s result, and the most memory that its tensors, the result too, took at a time."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        return result, (torch.cuda.max_memory_allocated() - before) / 2**20
    cpu = torch.profiler.ProfilerActivity.CPU
    with tempfile.TemporaryDirectory() as folder:
        with silent_stderr():  # the profiler announces itself there
            with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
                result = run()
            profile.export_chrome_trace(f"{folder}/trace.json")
        with open(f"{folder}/trace.json") as file:
            events = json.load(file)["traceEvents"]
    allocations = [event for event in events if event.get("name") == "[memory]"]
    allocations.sort(key=lambda event: event["ts"])
    changes = [event["args"]["Bytes"] for event in allocations]
    return result, max(itertools.accumulate(changes)) / 2**20


def spy_on(name):
    """Records the calls of a function of duality.py."""
    return mock.patch.object(duality, name, wraps=getattr(duality, name))


def matrix_made(name, za, zb):
    """The size of the matrix that a criterion computes, seen from the functions it calls."""
    with spy_on("dual_route") as dual_route, spy_on("checkpoint") as checkpoint:
        CRITERIA[name](za, zb)
    if name in ("simclr", "dcl"):
        side = "2N"
    else:
        side = "N" if dual_route.called else "D"
    return f"{side} x {side}" + ", blocks" * checkpoint.called


def bare_products(name, za, zb):
    """The matrix products that cannot be avoided: one forward, the products with it backward."""
    if name in ("simclr", "dcl"):
        z = torch.cat((za, zb))
        return z @ z.T @ z
    n, d = za.shape
    by_samples = n < d and name != "vicreg-exp"
    a, b = (za, zb) if by_samples else (za.T, zb.T)
    if name == "barlow-twins" and not by_samples:
        c = a @ b.T
        return c @ b, c.T @ a
    return a @ a.T @ a, b @ b.T @ b


def compiled_criterion(name):
    torch.compiler.reset()  # all criteria share a wrapper, which is compiled eight times at most
    terms = torch.compile(CRITERIA[name].terms, dynamic=False)
    return lambda za, zb: sum(terms(za, zb).values())


def print_header(device):
    if device == "cuda":
        where = torch.cuda.get_device_name()
    else:
        where = f"{torch.get_num_threads()} CPU threads"
    print(
        f"Loss and gradient in float32, torch {torch.__version__}, {where}\n"
        "duality.py: matrix made, median ms, peak MiB, relative error of value and gradient"
        " | published\n"
        "code: these, and its ms and MiB over duality.py's"
        " | bare products: ms, duality.py's over them\n\n"
        f"{'criterion':12} {'N':>4} {'D':>4} {'matrix':13} {'ms':>6} {'MiB':>6} {'errors':15}"
        f" | {'':8} {'ms':>7} {'ratio':>5} {'MiB':>6} {'ratio':>5} {'errors':15}"
        f" | {'ms':>6} {'ratio':>5}"
    )


def measure(functions, exact, bare, leaves, device, budget):
    """Milliseconds of the bare products; of each function (milliseconds, MiB, errors)."""
    runs = [partial(value_and_gradients, function, *leaves) for function in functions]
    bare_ms, *times = median_ms([bare, *runs], device, budget)
    rows = []
    for run, ms in zip(runs, times):
        found, mib = run_with_peak_mib(run, device)
        value_error, gradient_error = relative_errors(found, exact)
        rows.append((ms, mib, f"{value_error:.1e} {gradient_error:.1e}"))
    return bare_ms, rows


def benchmark_criterion(name, n, d, peers, device, budget, compile):
    """Prints a line for each peer; returns the milliseconds of each peer."""
    leaves = [z.to(device).requires_grad_() for z in two_views(n, d, dtype=torch.float32)]
    constants = [z.detach() for z in leaves]
    exact = value_and_gradients(CRITERIA[name], *(z.double() for z in constants))
    ours = CRITERIA[name]
    if compile:
        ours = compiled_criterion(name)
        value_and_gradients(ours, *leaves)  # compiles it
    functions = [ours, *(PUBLISHED[name, peer] for peer in peers)]
    bare = partial(bare_products, name, *constants)
    bare_ms, (own_row, *peer_rows) = measure(functions, exact, bare, leaves, device, budget)
    ms, mib, errors = own_row
    left = f"{name:12} {n:4} {d:4} {matrix_made(name, *leaves):13} {ms:6.1f} {mib:6.1f} {errors}"
    right = f"{bare_ms:6.1f} {ms / bare_ms:5.2f}"
    for peer, (peer_ms, peer_mib, errors) in zip(peers, peer_rows):
        middle = (
            f"{peer:8} {peer_ms:7.1f} {peer_ms / ms:5.1f}"
            f" {peer_mib:6.1f} {peer_mib / mib:5.1f} {errors}"
        )
        print(f"{left} | {middle} | {right}", flush=True)
    return [peer_ms for peer_ms, *_ in peer_rows]


def benchmark(device, sizes, names, budget, compile=False):
    print_header(device)
    run_with_peak_mib(partial(torch.ones, 1, device=device), device)  # the first use is slow
    widest = max(sizes, key=lambda size: (size[1], -size[0]))
    speeds = {}  # by criterion and peer, in multiplications per second
    for name, (n, d) in itertools.product(names, sizes):
        if name == "vicreg-exp" and [n, d] != widest:
            continue  # its D x D matrix hardly depends on N: one size is enough
        work = n * d * (n if name in ("simclr", "dcl") else d)
        peers = []
        for criterion, peer in PUBLISHED:
            fast = work < 15 * speeds.get((name, peer), math.inf)  # takes less than 15 seconds
            if criterion == name and (fast or (n, d) == (256, 8192)):
                peers.append(peer)
        times = benchmark_criterion(name, n, d, peers, device, budget, compile)
        for peer, ms in zip(peers, times):
            speeds[name, peer] = work / ms * 1e3


def benchmark_views(budget):
    """Images per second of one core: torchvision's transforms of PIL images, and train.Views."""
    torch.set_num_threads(1)
    images, _ = train.shapes(256, 0)
    batched, compiled = train.Views(32), train.Views(32)
    compiled.apply = torch.compile(compiled.apply, dynamic=False)  # as train.py --compile does
    compiled(images[None])
    pil_images = [transforms.ToPILImage()(image) for image in images]
    pipeline = transforms.Compose(
        [
            transforms.RandomResizedCrop(32, (0.2, 1)),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
            transforms.RandomGrayscale(0.2),
            transforms.ToTensor(),
            transforms.Normalize(train.MEAN, train.STD),
        ]
    )
    runs = [
        lambda: torch.stack([pipeline(image) for image in pil_images]),
        lambda: batched(images[None]),
        lambda: compiled(images[None]),
    ]
    pil_ms, batched_ms, compiled_ms = median_ms(runs, "cpu", 3 * budget)
    print(
        f"\nviews of 32-pixel images, one core: {256e3 / pil_ms:.0f} images/s by torchvision's PIL"
        f" pipeline, by train.Views {256e3 / batched_ms:.0f}, ratio {pil_ms / batched_ms:.1f};"
        f" compiled {256e3 / compiled_ms:.0f}, ratio {pil_ms / compiled_ms:.1f}"
    )


def benchmark_size(text):
    n, d = text.split("x")
    return [int(n), int(d)]


def run_benchmark():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--benchmark", action="store_true", required=True)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--criteria",
        nargs="+",
        metavar="NAME",
        choices={name for name, _ in PUBLISHED},
        default=["vicreg", "barlow-twins", "simclr", "vicreg-exp"],
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        metavar="NxD",
        type=benchmark_size,
        default=[[n, d] for n in (256, 1024) for d in (512, 2048, 8192)],
    )
    parser.add_argument(
        "--seconds", type=float, default=0.3, help="of repeats, for each time measured"
    )
    parser.add_argument("--compile", action="store_true", help="the criteria of duality.py")
    args = parser.parse_args()
    benchmark(args.device, args.sizes, args.criteria, args.seconds, args.compile)
    benchmark_views(args.seconds)


if __name__ == "__main__" and "--worker" not in sys.argv:
    run_benchmark()
    sys.exit()  # before the tests, so that the benchmark does without their packages

# --- The tests -----------------------------------------------------------------------------------

torch.set_num_threads(1)  # on a busy machine threads wait for each other at each operation

HERE = Path(__file__).parent
BACKENDS = {"cuda": torch.cuda, "mps": torch.backends.mps}
ACCELERATORS = [name for name, backend in BACKENDS.items() if backend.is_available()]

SHAPES = [(8, 5), (5, 12), (12, 12), (6, 30)]
OTHER_VALUES = {  # none of them a default
    "invariance": 3.0,
    "variance": 2.0,
    "covariance": 0.7,
    "repulsion": 0.3,
    "redundancy": 0.1,
    "temperature": 0.07,
    "negatives": "own",
    "radius": 1.5,
    "eps": 0.3,
    "t": 0.3,
}
every_criterion = pytest.mark.parametrize("name", CRITERIA)
every_shape = pytest.mark.parametrize("n, d", SHAPES)
whole_and_in_blocks = pytest.mark.parametrize("block", [duality.CPU_BLOCK, 30])


def set_block(monkeypatch, entries):
    """Sets how many entries of a log-sum-exp's matrix duality.py holds at a time."""
    monkeypatch.setattr(duality, "CPU_BLOCK", entries)
    monkeypatch.setattr(duality, "GPU_BLOCK", entries)


def assert_equal(found, exact, tolerance=1e-10):
    assert len(found) == len(exact)
    for x, y in zip(found, exact):
        assert x.shape == y.shape
        assert (x - y).norm() <= tolerance * (1 + y.norm()), (x, y)


def accepted_by(name, values):
    """Those of the values that are hyperparameters of the criterion."""
    parameters = inspect.signature(CRITERIA[name]).parameters
    return {key: value for key, value in values.items() if key in parameters}


def loss_from_terms(name):
    """The sum of a criterion's terms, which train.py computes."""
    return lambda *zs, **hyperparameters: sum(CRITERIA[name].terms(*zs, **hyperparameters).values())


def sum_of_all_criteria(za, zb):
    return sum(criterion(za, zb) for criterion in CRITERIA.values())


def rotation(n):
    return torch.linalg.qr(two_views(n, n)[1]).Q


# --- The theorem ---


@pytest.mark.parametrize("n, d", [(2, 2), (40, 3), (3, 40), *SHAPES])
def test_theorem_3_3(n, d):
    z = two_views(n, d)[0]
    l_c, l_nc = (off_diagonal(k @ k.T).square().sum() for k in (z, z.T))
    embeddings, dimensions = (sum(x.norm() ** 4 for x in k) for k in (z, z.T))
    assert_equal((duality.L_c(z), duality.L_nc(z)), (l_c, l_nc))
    assert_equal((duality.norms4(z), duality.norms4(z.T)), (embeddings, dimensions))
    assert_equal((duality.L_c(z=z), duality.norms4(z=z)), (l_c, embeddings))
    assert_equal([l_nc + dimensions], [l_c + embeddings])


@given(st.integers(2, 40), st.integers(2, 40), st.floats(0.1, 10), st.booleans())
@settings(deadline=None, derandomize=True, max_examples=60)
def test_lemma_3_4_and_corollary_3_4_1(n, d, a, transpose):
    x = unit(two_views(n, d)[0].exp())
    low, high = duality.lemma_3_4(n, d, a)
    assert low - 1e-6 <= duality.norms4(a * x.T) <= high + 1e-6
    # equal entries reach the lower bound, a single dimension that is not 0 the upper one
    assert duality.norms4(torch.full((d, n), a / d**0.5)).item() == pytest.approx(low)
    one_dimension = torch.tensor([[a] * n] + [[0] * n] * (d - 1))
    assert duality.norms4(one_dimension).item() == pytest.approx(high)
    if transpose:  # n dimensions of norm 1
        criterion, dual, z = duality.L_nc, duality.L_c, x.T
    else:  # n embeddings of norm 1
        criterion, dual, z = duality.L_c, duality.L_nc, x
    low, high = duality.corollary_3_4_1(x)
    assert low - 1e-6 <= criterion(z) <= high + 1e-6
    assert_equal((low, high), (dual(z) - n + n**2 / d, dual(z) - n + n**2))


@every_shape
def test_rows_and_columns_of_like_norms(n, d):
    z = two_views(n, d)[0]
    for _ in range(2000):
        z = unit(unit(z).T).T * (n / d) ** 0.5
    # Now sum_j ||K_j,.||^4 is at its lower bound N^2 / M. With M = N both norms are 1.
    assert_equal([duality.L_nc(z)], [duality.L_c(z) + n - n**2 / d])
    assert duality.L_c(z) > 0.1


def test_module_shows_the_theorem(capsys):
    runpy.run_path(duality.__file__, run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["L_nc", "L_c"]
    (l_nc, dimensions, left), (l_c, embeddings, right) = (
        map(float, re.findall(r"\d+\.\d+", line)) for line in lines
    )
    assert left == right
    assert l_nc + dimensions == pytest.approx(left, abs=0.02)
    assert l_c + embeddings == pytest.approx(right, abs=0.02)


# --- Two routes ---


def plain_route(a, b):
    """(all a_i . b_i, sum of (a_i . b_j)^2 over i != j)."""
    products = a @ b.T
    return products.diagonal(), off_diagonal(products).square().sum()


def scalar_of_route(route):
    """f(a, b), from both results of a route. Its gradient shows each entry of the diagonal."""

    def function(a, b):
        diagonal, squares = route(a, b)
        weights = torch.arange(len(a), dtype=a.dtype)
        return squares + weights @ diagonal

    return function


def with_itself(function):
    return lambda a: function(a, a)


@pytest.mark.parametrize("n, d", [(2, 9), (40, 3), (3, 40), *SHAPES])
def test_routes_are_equal(n, d):
    exact = scalar_of_route(plain_route)
    for a, b in (two_views(n, d), [z.T for z in two_views(n, d)]):
        exact_cross = value_and_gradients(exact, a, b)
        exact_same = value_and_gradients(with_itself(exact), a)
        for route in (duality.direct_route, duality.dual_route, duality.cheaper_route):
            function = scalar_of_route(route)
            assert_equal(value_and_gradients(function, a, b), exact_cross)
            assert_equal(value_and_gradients(with_itself(function), a), exact_same)


def nearly_orthogonal(za, zb):
    """Views whose dimensions (N >= D) or embeddings (N < D) are nearly orthogonal."""
    n, d = za.shape
    u, _, v = torch.linalg.svd(centered(za), full_matrices=False)
    return [max(n, d) ** 0.5 * u @ v + 0.02 * z for z in (za, zb)]


@pytest.mark.parametrize("n, d", [(64, 64), (64, 96), (64, 128), (64, 256), (64, 1024), (256, 64)])
@pytest.mark.parametrize("near_optimum", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "vicreg",
        "vicreg-contrastive",
        "barlow-twins",
        "spectral",
        "sample-contrastive",
        "dimension-contrastive",
    ],
)
def test_route_taken_is_as_accurate_as_the_direct(name, n, d, near_optimum, monkeypatch):
    routes = duality.cheaper_route, duality.direct_route
    found = []
    for seed in range(9):
        if near_optimum:
            za, zb = nearly_orthogonal(*two_views(n, d, seed, noise=0.05))
        else:
            za, zb = two_views(n, d, seed)
        za, zb = za.float(), zb.float()
        exact = value_and_gradients(CRITERIA[name], za.double(), zb.double())
        for route in routes:
            monkeypatch.setattr(duality, "cheaper_route", route)
            found.append(relative_errors(value_and_gradients(CRITERIA[name], za, zb), exact))
        monkeypatch.undo()
    taken, direct = torch.tensor(found).view(9, 2, 2).median(0).values
    assert (taken <= 2 * direct + 4 * torch.finfo(torch.float32).eps).all(), (taken, direct)


@pytest.mark.parametrize("transpose", [False, True])
def test_large_sums_of_squares_keep_their_digits(transpose):
    z = two_views(3000, 1600, dtype=torch.float32)[0]
    z = z.T if transpose else z
    exact = duality.L_c(z.double())
    assert abs(duality.L_c(z).double() / exact - 1) < 1e-6


def test_matrix_is_the_smallest(monkeypatch):
    for name in ("vicreg", "barlow-twins", "dimension-contrastive"):
        assert matrix_made(name, *two_views(8, 16)) == "N x N"
        assert matrix_made(name, *two_views(16, 8)) == "D x D"
    assert matrix_made("vicreg-exp", *two_views(8, 16)) == "D x D"
    set_block(monkeypatch, 15 * 16)
    assert matrix_made("vicreg-exp", *two_views(8, 16)) == "D x D, blocks"


# --- Every criterion: its formula ---


def test_every_criterion_has_a_plain_reference():
    assert set(PLAIN) == set(CRITERIA)


@every_shape
@pytest.mark.parametrize("other", [{}, OTHER_VALUES])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_reference(name, other, n, d):
    criterion, zs = CRITERIA[name], two_views(n, d)
    hyperparameters = accepted_by(name, other)
    exact = value_and_gradients(PLAIN[name], *zs, **hyperparameters)
    assert_equal(value_and_gradients(criterion, *zs, **hyperparameters), exact)
    assert_equal(value_and_gradients(loss_from_terms(name), *zs, **hyperparameters), exact)
    assert criterion is getattr(duality, name.replace("-", "_"))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 5e-6)])
@pytest.mark.parametrize("n, d", [(32, 80), (64, 24)])
@pytest.mark.parametrize("name, peer", PUBLISHED)
def test_published_code(name, peer, n, d, dtype, tolerance):
    zs = two_views(n, d, dtype=dtype)
    found = value_and_gradients(CRITERIA[name], *zs)
    published = value_and_gradients(PUBLISHED[name, peer], *zs)
    assert max(relative_errors(found, published)) < tolerance


@every_shape
def test_eq_10_is_vicreg(n, d):
    zs = two_views(n, d)
    found = value_and_gradients(duality.vicreg_contrastive, *zs)
    assert_equal(found, value_and_gradients(duality.vicreg, *zs))


@every_shape
def test_chain(n, d):
    zs = two_views(n, d)
    links = [value_and_gradients(CRITERIA[name], *zs) for name in CHAIN]
    for t, exact in enumerate(links):
        assert_equal(value_and_gradients(duality.chain, *zs, t=t), exact)
    middle = [(x + y) / 2 for x, y in zip(links[1], links[2])]
    assert_equal(value_and_gradients(duality.chain, *zs), middle)
    # in 300 small steps the loss nowhere jumps
    path = torch.stack([duality.chain(*zs, t=i / 100) for i in range(301)])
    largest = max(abs(x[0] - y[0]) for x, y in zip(links, links[1:]))
    assert path.diff().abs().max() < largest / 90


@pytest.mark.parametrize("similarity", [identity, torch.square, torch.abs])
@pytest.mark.parametrize("samples", [8, 4])
@whole_and_in_blocks
def test_log_sum_exp(similarity, samples, block, monkeypatch):
    set_block(monkeypatch, block)
    a = two_views(8, 5)[0]
    exact = []
    for i, x in enumerate(a):
        others = [y for j, y in enumerate(a) if (i - j) % samples]
        exact.append(sum((similarity(x @ y) / 0.3).exp() for y in others).log())
    found = duality.log_sum_exp(a, 0.1, 3, n_samples=samples, similarity=similarity)
    assert_equal(found, exact)


@pytest.mark.parametrize(
    "name, key, bad",
    [
        ("simclr", "negatives", "all"),
        ("simclr", "temperature", 0.0),
        ("vicreg-exp", "temperature", -1.0),
        ("chain", "t", 3.01),
        ("chain", "t", -0.01),
    ],
)
def test_bad_hyperparameter(name, key, bad):
    with pytest.raises(ValueError, match=f"{key}.*{bad}"):
        CRITERIA[name](*two_views(4, 3), **{key: bad})


# --- Every criterion: its gradient, its symmetries ---


@every_criterion
@pytest.mark.parametrize("n, d", [(6, 3), (3, 6)])
def test_gradcheck(name, n, d, monkeypatch):
    zs = [z.requires_grad_() for z in two_views(n, d)]
    whole = value_and_gradients(CRITERIA[name], *zs)
    set_block(monkeypatch, 30)
    assert_equal(value_and_gradients(CRITERIA[name], *zs), whole)
    assert torch.autograd.gradcheck(CRITERIA[name], zs)


@every_criterion
def test_second_derivative_is_right_or_an_error(name):
    zs = [z.requires_grad_() for z in two_views(5, 3)]
    try:
        assert torch.autograd.gradgradcheck(CRITERIA[name], zs)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        assert name.startswith(("simclr", "dcl", "vicreg-exp", "vicreg-ctr", "chain"))


def reordered(z):
    """The same samples in another order."""
    return z.roll(2, 0).flip(0)


@every_criterion
def test_order_of_samples_is_nothing(name):
    for zs in itertools.starmap(two_views, SHAPES):
        value, *gradients = value_and_gradients(CRITERIA[name], *zs)
        found = value_and_gradients(CRITERIA[name], *map(reordered, zs))
        assert_equal(found, (value, *map(reordered, gradients)))


@pytest.mark.parametrize("name", PLAIN)
def test_order_of_views_is_nothing(name):
    for za, zb in itertools.starmap(two_views, SHAPES):
        value, gradient_a, gradient_b = value_and_gradients(CRITERIA[name], za, zb)
        found = value_and_gradients(CRITERIA[name], zb, za)
        assert_equal(found, (value, gradient_b, gradient_a))


def rotate_dimensions(z):
    return z @ rotation(z.shape[1])


def rotate_samples(z):
    """K Q for a rotation Q with Q 1 = 1, which leaves the samples' mean where it is."""
    n = len(z)
    basis = torch.linalg.qr(torch.cat((torch.ones(n, 1), two_views(n, n - 1)[0]), 1)).Q
    return basis @ torch.block_diag(torch.ones(1, 1), rotation(n - 1)) @ basis.T @ z


def translate(z):
    return z + torch.arange(z.shape[1])


def change_lengths(z):
    return z * torch.arange(1, len(z) + 1)[:, None]


COSINES = {"simclr", "simclr-sq", "simclr-abs", "simclr-centered", "dcl", "dcl-sq", "dcl-abs"}
COVARIANCES = {
    "vicreg",
    "vicreg-contrastive",
    "vicreg-exp",
    "barlow-twins",
    "dimension-contrastive",
}
LAWS = {  # a change, and the criteria that it leaves as they are; all others must notice it
    "rotation": (rotate_dimensions, COSINES | {"spectral", "tcr", "vicreg-ctr"}),
    "rotation of samples": (rotate_samples, COVARIANCES),
    "translation": (
        translate,
        COVARIANCES
        | {"vicreg-ctr", "simclr-centered", "simclr-standardized", "sample-contrastive", "chain"},
    ),
    "lengths": (change_lengths, COSINES - {"simclr-centered"} | {"tcr"}),
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("law", LAWS)
def test_invariant_or_not(name, law):
    change, invariant = LAWS[law]
    zs = two_views(6, 9)
    before, after = CRITERIA[name](*zs), CRITERIA[name](*map(change, zs))
    same = abs(before - after) < 1e-9 * (1 + abs(before))
    assert same == (name in invariant), (before, after)


# --- Every criterion: whatever is put in ---


@every_criterion
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@whole_and_in_blocks
def test_half_precision(name, dtype, block, monkeypatch):
    set_block(monkeypatch, block)
    zs = [z.requires_grad_() for z in two_views(16, 40, dtype=dtype)]
    value, *gradients = value_and_gradients(CRITERIA[name], *(z.detach().float() for z in zs))
    assert value.dtype == torch.float32
    assert value.ndim == 0
    exact = value, *(gradient.to(dtype) for gradient in gradients)
    assert_equal(value_and_gradients(CRITERIA[name], *zs), exact, 0)
    with torch.autocast("cpu", torch.bfloat16):
        loss, l_c = CRITERIA[name](*zs), duality.L_c(zs[0])
    assert_equal((loss, *torch.autograd.grad(loss, zs)), exact, 0)
    assert_equal([l_c], [duality.L_c(zs[0].float())], 0)


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
@whole_and_in_blocks
def test_collapsed(name, kind, block, monkeypatch):
    set_block(monkeypatch, block)
    za, zb = map(DEGENERATE[kind], two_views(6, 9, dtype=torch.float32))
    for zs in ((za, zb), (za, za), (za.double(), zb.double())):
        for hyperparameters in ({}, accepted_by(name, {"temperature": 0.01})):
            found = value_and_gradients(CRITERIA[name], *zs, **hyperparameters)
            assert all(x.isfinite().all() for x in found)


@every_criterion
@every_shape
def test_criteria_compile_whole(name, n, d):
    torch.compiler.reset()
    terms = torch.compile(CRITERIA[name].terms, backend="aot_eager", fullgraph=True)
    found = value_and_gradients(lambda *zs: sum(terms(*zs).values()), *two_views(n, d))
    assert_equal(found, value_and_gradients(CRITERIA[name], *two_views(n, d)))


@every_criterion
@pytest.mark.parametrize(
    "a, b",
    [
        ((4, 5), (4, 6)),
        ((4, 5), (5, 5)),
        ((4,), (4,)),
        ((2, 3, 4), (2, 3, 4)),
        ((1, 5), (1, 5)),
        ((4, 0), (4, 0)),
    ],
)
def test_bad_shapes(name, a, b):
    for function in (CRITERIA[name], CRITERIA[name].terms):
        with pytest.raises(ValueError, match=re.escape(f"{a}, {b}")):
            function(torch.randn(a), torch.randn(b))


@every_criterion
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite(name, bad):
    good, other = two_views(4, 5)
    worse = other.index_fill(1, torch.tensor(2), bad)
    for zs in ((good, worse), (worse, good)):
        with pytest.raises(ValueError, match=name.replace("-", "[-_]")):
            CRITERIA[name](*zs)


@every_criterion
@given(
    st.integers(2, 9),
    st.integers(1, 12),
    st.integers(-20, 20),
    st.integers(-20, 20),
    st.integers(0, 99),
    st.sampled_from([identity, *DEGENERATE.values()]),
)
@settings(deadline=None, derandomize=True, max_examples=60)
def test_finite_or_refused(name, n, d, a, b, seed, kind):
    za, zb = map(kind, two_views(n, d, seed, dtype=torch.float32))
    za, zb = za * 10.0**a, zb * 10.0**b
    try:
        value, *gradients = value_and_gradients(CRITERIA[name], za, zb)
    except ValueError:
        assert max(a, b) > 8 or d == 1
    else:
        terms = CRITERIA[name].terms(za.double(), zb.double()).values()
        near = abs(value - sum(terms)) <= 1e-4 * (1 + sum(map(abs, terms)))
        # collapsed embeddings, normalised, are rounding noise: their loss need only be finite
        assert near or kind in DEGENERATE.values()
        assert all(gradient.isfinite().all() for gradient in gradients)


# --- To watch and to distribute ---


@pytest.mark.parametrize(
    "spectrum", [[1.0] * 7, [1.0] + [0.0] * 6, [4.0, 2.0, 1.0, 1.0, 0.5, 0.25, 0.0]]
)
@pytest.mark.parametrize("n, d", [(7, 7), (7, 20), (20, 7)])
def test_rankme(spectrum, n, d):
    z = rotation(n)[:, :7] * torch.tensor(spectrum) @ rotation(d)[:7]
    shares = [s / sum(spectrum) for s in spectrum if s]
    entropy = -sum(p * math.log(p) for p in shares)
    assert duality.diagnose(z)["rankme"].item() == pytest.approx(math.exp(entropy), rel=1e-4)


@pytest.mark.parametrize("n, d", [(20, 7), (14, 7), (7, 20), (7, 14)])
def test_diagnose_makes_no_matrix_of_the_longer_side(n, d):
    with spy_on("gram") as gram:
        duality.diagnose(two_views(n, d)[0])
    assert max(len(call.args[0]) for call in gram.call_args_list) <= min(n, d)


class OnMPS(torch.Tensor):
    """A stand-in for a tensor on Apple's GPU, which has no float64."""

    device = property(lambda self: torch.device("mps"))

    def double(self):
        raise TypeError("MPS has no float64")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_diagnose_needs_no_float64_of_apples_gpu():
    z = two_views(6, 9, dtype=torch.float32)[0]
    found = duality.diagnose(z.clone().as_subclass(OnMPS))
    assert found == duality.diagnose(z)


@pytest.mark.parametrize("n, d", [*SHAPES, (20, 7), (7, 20)])
def test_diagnose(n, d):
    z = two_views(n, d)[0] + 0.5
    found = {name: value.item() for name, value in duality.diagnose(z).items()}
    stds = [statistics.stdev(dimension.tolist()) for dimension in z.T]
    norms = [x.norm().item() for x in z]
    cosines = off_diagonal(unit(z) @ unit(z).T).tolist()
    theorem = (duality.L_c(z) + duality.norms4(z)).item()
    assert found == pytest.approx(
        {
            "std_mean": statistics.mean(stds),
            "std_min": min(stds),
            "norm_mean": statistics.mean(norms),
            "norm_std": statistics.stdev(norms),
            "L_c": duality.L_c(z).item(),
            "L_nc": duality.L_nc(z).item(),
            "theorem_left": theorem,
            "theorem_right": theorem,
            "rankme": found["rankme"],  # test_rankme
            "negative_mean": statistics.mean(cosines),
            "negative_variance": statistics.pvariance(cosines),
        }
    )


@pytest.mark.parametrize("kind", DEGENERATE)
def test_diagnose_collapsed(kind):
    z = DEGENERATE[kind](two_views(6, 9, dtype=torch.float16)[0])
    found = duality.diagnose(z)
    assert all(value.isfinite() for value in found.values())
    if kind.startswith("all"):
        assert found["std_min"] < 1e-9
        assert found["rankme"] < 1.001


def gather_in_process(rank, folder):
    """One of two processes, each with half of the batch; saves losses and its own gradients."""
    meeting = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=2)

    def loss(za, zb):
        return sum(f(duality.gather(za), duality.gather(zb)) for f in CRITERIA.values())

    def own_loss(za, zb):  # one gradient for both gathers, which may not change it
        return (rank + 1) * (duality.gather(za) + duality.gather(zb)).square().sum()

    halves = [z.chunk(2)[rank] for z in two_views(8, 5)]
    found = [value_and_gradients(function, *halves) for function in (loss, own_loss)]
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_gather_is_one_process_with_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(gather_in_process, (str(tmp_path),), nprocs=2)
    za, zb = two_views(8, 5)
    value, *gradients = value_and_gradients(sum_of_all_criteria, za, zb)
    for rank in (0, 1):
        (found, *parts), (_, *own_parts) = torch.load(tmp_path / f"{rank}.pt")
        averaged = [part / 2 for part in parts]  # DDP divides by the number of processes
        assert_equal((found, *averaged), (value, *(g.chunk(2)[rank] for g in gradients)))
        expected = (1 + 2) * 2 * (za + zb).chunk(2)[rank]  # of both processes' losses
        assert_equal(own_parts, [expected, expected])
    assert duality.gather(found) is found


# --- Views ---------------------------------------------------------------------------------------

NEUTRAL = {  # parameters of the views that change nothing
    "brightness": 1.0,
    "contrast": 1.0,
    "saturation": 1.0,
    "hue": 0.0,
    "grey": 0.0,
    "sigma": 1e-3,
    "solarise": 0.0,
}
MEAN, STD = (
    torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
)


def random_state(seed):
    return torch.Generator().manual_seed(seed)


def unnormalized(views):
    """Views as images in [0, 1]."""
    return views * STD + MEAN


def apply_parameters(images, size, **parameters):
    """The views of uint8 images with these parameters, the others neutral, in [0, 1]."""
    n, _, height, width = images.shape
    recipe = train.Views(size, blur=1.0, solarise=1.0)
    whole = {"top": 0.0, "left": 0.0, "height": float(height), "width": float(width)}
    values = {**NEUTRAL, **whole, **parameters}
    columns = {name: torch.as_tensor(value).expand(n)[:, None] for name, value in values.items()}
    return unnormalized(recipe.apply(images, columns))


def pictures(n=4, height=32, width=32):
    """Random uint8 images; the first also has greys and pixels with two equal channels."""
    shape = n, 3, height, width
    images = torch.randint(0, 256, shape, generator=random_state(0), dtype=torch.uint8)
    images[0, :, 0] = 128
    images[0, 1:, 1] = 40
    images[0, 2, 2] = images[0, 0, 2]
    return images


def assert_same_images(found, expected, tolerance=5e-6):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "name, values, function",
    [
        ("brightness", (0.6, 1.0, 1.4, 1.9), TF.adjust_brightness),
        ("contrast", (0.6, 1.0, 1.4, 0.1), TF.adjust_contrast),
        ("saturation", (0.6, 1.0, 1.4, 2.0), TF.adjust_saturation),
        ("hue", (-0.5, -0.1, 0.07, 0.5), TF.adjust_hue),
        ("grey", (1.0, 0.0, 1.0, 0.0), lambda x, v: TF.rgb_to_grayscale(x, 3) if v else x),
        ("solarise", (1.0, 0.0, 1.0, 0.0), lambda x, v: TF.solarize(x, 0.5) if v else x),
        ("sigma", (0.1, 0.5, 1.0, 2.0), lambda x, v: TF.gaussian_blur(x, 3, v)),
    ],
)
def test_operation_is_torchvisions(name, values, function):
    images = pictures()
    found = apply_parameters(images, 32, **{name: torch.tensor(values)})
    expected = [function(image, value) for image, value in zip(images / 255, values)]
    assert_same_images(found, torch.stack(expected))


def test_hues_turn_in_a_circle():
    turns = torch.tensor([-1.0, -0.93, 0.9, 1.0])
    same_turns = torch.tensor([0.0, 0.07, -0.1, 0.0])
    found, expected = (apply_parameters(pictures(), 32, hue=hue) for hue in (turns, same_turns))
    assert_same_images(found, expected)


@pytest.mark.parametrize(
    "box, height, width, size",
    [
        ((0, 0, 32, 32), 32, 32, 32),
        ((3, 5, 20, 17), 32, 32, 32),
        ((3, 5, 40, 17), 48, 40, 24),
        ((0, 0, 64, 48), 64, 48, 16),
        ((9, 2, 2, 3), 32, 32, 32),
        ((31, 0, 1, 1), 32, 32, 16),
    ],
)
def test_crop_is_torchvisions(box, height, width, size):
    images = pictures(2, height, width)
    parameters = dict(zip(("top", "left", "height", "width"), map(float, box)))
    found = apply_parameters(images, size, **parameters)
    expected = TF.resized_crop(images / 255, *box, [size, size], antialias=True)
    assert_same_images(found, expected)


@pytest.mark.parametrize("size", [32, 12])
def test_flip_is_torchvisions(size):
    images = pictures(2)
    # a flipped view has a negative width, from its right edge on
    right, width = torch.tensor([32.0, 27.0]), torch.tensor([-32.0, -17.0])
    found = apply_parameters(images, size, left=right, width=width)
    expected = []
    for image, left, width in zip(images, (0, 10), (32, 17)):
        crop = TF.resized_crop(image / 255, 0, left, 32, width, [size, size], antialias=True)
        expected.append(TF.hflip(crop))
    assert_same_images(found, torch.stack(expected))


def test_blur_reaches_further_in_larger_images():
    images = pictures(2, 64, 64)
    found = apply_parameters(images, 64, sigma=1.5)
    assert_same_images(found, TF.gaussian_blur(images / 255, 7, 1.5))


def fraction(mask):
    return mask.double().mean()


@pytest.mark.parametrize("least_area", [0.08, 0.2, 0.6, 1])
def test_crops_are_distributed_as_torchvisions(least_area):
    torch.manual_seed(0)
    n, image = 20_000, torch.empty(3, 32, 32)
    expected = [
        transforms.RandomResizedCrop.get_params(image, (least_area, 1), (3 / 4, 4 / 3))
        for _ in range(n)
    ]
    p = train.Views(32, crop=least_area, flip=0).draw(n, 32, 32)
    found = torch.cat([p[name] for name in ("top", "left", "height", "width")], 1)
    for side, expected_side in zip(found.T, torch.tensor(expected).T):
        counts = torch.stack([s.long().bincount(minlength=33) for s in (side, expected_side)])
        distance = (counts.cumsum(1)[0] - counts.cumsum(1)[1]).abs().max() / n
        assert distance < 0.02  # Kolmogorov-Smirnov: a chance of 1 in 1000 by seed


def test_views_are_drawn_for_each_sample_in_the_ranges_set():
    images, recipe = pictures(1).expand(4000, -1, -1, -1), train.Views(32, blur=0.5, solarise=0.3)
    p = recipe.draw(4000, 32, 48, generator=random_state(0))
    top, left, height, width = (p[name] for name in ("top", "left", "height", "width"))
    assert abs(fraction(width < 0) - 0.5) < 0.03  # flipped
    # boxes reach every edge of the image and never leave it
    for start, length, side in ((top, height, 32), (left, width, 48)):
        edges = torch.cat((start, start + length))
        assert edges.min() == 0
        assert edges.max() == side
    area = height * width.abs() / (32 * 48)
    assert 0.19 < area.min() < 0.22  # 0.2 before sides are rounded
    assert area.max() <= 1
    for name, neutral, expected in (
        ("grey", 0, 0.2),
        ("solarise", 0, 0.3),
        ("hue", 0, 0.8),
        ("brightness", 1, 0.8),
        ("contrast", 1, 0.8),
        ("saturation", 1, 0.8),
    ):
        assert abs(fraction(p[name] != neutral) - expected) < 0.03, name
    assert abs(fraction(p["sigma"] > 0.1) - 0.5) < 0.03
    assert p["sigma"].unique()[0] == torch.tensor(1e-3)
    assert p["sigma"].unique()[1] > 0.1
    assert 1.98 < p["sigma"].max() <= 2.001 + 1e-6
    assert all(p[name].unique().tolist() == [0, 1] for name in ("grey", "solarise"))
    assert all(value.shape == (4000, 1) for value in p.values())
    assert p["hue"].abs().max() <= 0.1
    assert 0.6 <= p["brightness"].min() < 0.62
    assert 1.38 < p["contrast"].max() <= 1.4
    assert 0.8 <= p["saturation"].min() < 0.82
    a, b = (recipe(images[None, :100], random_state(seed)) for seed in (1, 2))
    assert len(a.flatten(1).unique(dim=0)) == 100
    assert not torch.equal(a, b)
    assert a.shape == (100, 3, 32, 32)
    assert a.dtype == torch.float32
    assert a.isfinite().all()


def test_shares_of_a_batch_are_the_batch():
    images, recipe = torch.stack((pictures(96), pictures(96).flip(0))), train.Views(32)
    whole = recipe(images, random_state(5))
    assert whole.shape == (192, 3, 32, 32)
    parts = []
    for rank, part in enumerate(images.chunk(3, 1)):
        parts.append(recipe(part, random_state(5), rank, 3).unflatten(0, (2, 32)))
    assert_same_images(torch.cat(parts, 1).flatten(0, 1), whole, 1e-5)
    interleaved = images[0].to(memory_format=torch.channels_last)[None]
    expected = recipe(images[:1], random_state(5))
    assert_same_images(recipe(interleaved, random_state(5)), expected, 1e-5)


def test_views_are_the_same_under_autocast():
    images, recipe = pictures(3)[None], train.Views(24, blur=0.5)
    outside = recipe(images, random_state(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(recipe(images, random_state(0)), outside)


def test_images_without_augmentation_are_themselves():
    images, recipe = pictures(3), train.Views(32, crop=1, flip=0, jitter=0, grey=0)
    assert_same_images(unnormalized(recipe(images[None])), images / 255, 1e-6)


@pytest.mark.parametrize("name", list(inspect.signature(train.Views).parameters)[1:])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_views_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        train.Views(32, **{name: value})


def test_shapes_are_labelled_images_that_pixels_do_not_tell():
    x, y = train.shapes(1500, 0)
    test_x, test_y = train.shapes(800, 1)
    assert x.shape == (1500, 3, 32, 32)
    assert x.dtype == torch.uint8
    assert y.unique().tolist() == list(range(8))
    assert not torch.equal(x[:800], test_x)
    assert torch.equal(train.shapes(1500, 0)[0], x)
    pixels, test_pixels = x.flatten(1) / 255, test_x.flatten(1) / 255
    top1, _ = evaluation.linear_probe(pixels, y, test_pixels, test_y, 8, epochs=5, lr=1e-3)
    assert top1 < 30  # chance is 12.5


# --- Optimiser and probe -------------------------------------------------------------------------


def parse_train(line):
    """train.py's settings from a command line, which may begin with train.py itself."""
    words = shlex.split(line)
    if words[:1] == ["train.py"]:
        words = words[1:]
    return train.parse_args(words)


def test_lars_is_its_formula():
    torch.manual_seed(0)
    weights = [torch.randn(5, 4), torch.zeros(3, 3), torch.randn(6)]
    params = [weight.clone().requires_grad_() for weight in weights]
    lr, eta, decay = 0.3, 0.02, 1e-2
    groups = [{"params": params[:2], "decay": decay, "eta": eta}, {"params": params[2:]}]
    optimizer = train.LARS(groups, lr, momentum=0.9)
    momenta = [torch.zeros_like(weight) for weight in weights]
    for scale in (1.0, 1e-4, 10.0):
        for i, param in enumerate(params):
            param.grad = scale * torch.randn_like(param)
            gradient = param.grad
            if i < 2:
                gradient = gradient + decay * weights[i]
                if weights[i].norm() > 0:
                    gradient = gradient * eta * weights[i].norm() / gradient.norm()
            momenta[i] = 0.9 * momenta[i] + gradient
            weights[i] = weights[i] - lr * momenta[i]
        optimizer.step()
        for found, expected in zip(params, weights):
            torch.testing.assert_close(found.detach(), expected)


def test_decay_and_adaptation_spare_biases_and_norms():
    args = parse_train("--dataset cifar10 --arch resnet18 --projector 16-8 --batch-size 512")
    model = train.Model("resnet18", 32, "16-8", 10)
    main, _ = train.build_optimizers(args, model)
    assert main.defaults["momentum"] == 0.9
    decayed, spared = (set(map(id, group["params"])) for group in main.param_groups)
    modules = [*model.encoder.modules(), *model.projector.modules()]
    matrices = [m for m in modules if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert decayed == {id(module.weight) for module in matrices}
    assert not spared & decayed
    assert len(decayed | spared) == len(
        [*model.encoder.parameters(), *model.projector.parameters()]
    )
    assert main.param_groups[0]["lr"] == pytest.approx(0.2)
    assert [group["weight_decay"] for group in main.param_groups] == [0, 0]  # LARS has its own
    assert main.param_groups[0]["decay"] == 1e-4
    assert main.param_groups[0]["eta"] == 0.02
    assert "eta" not in main.param_groups[1]


def test_learning_rate_rises_then_falls():
    rates = [train.schedule(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))
    assert 0 < rates[-1] < 1e-3


def test_projector_is_the_papers():
    layers = train.Model("small", 32, "32-16-8", 10).projector
    kinds = [type(layer).__name__ for layer in layers]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    assert [layer.out_features for layer in layers[::3]] == [32, 16, 8]
    assert layers[-1].bias is None


def test_small_images_have_a_3x3_stem_without_pooling():
    for size, kernel, pool in ((64, (3, 3), torch.nn.Identity), (65, (7, 7), torch.nn.MaxPool2d)):
        encoder = train.Model("resnet18", size, "8", 4).encoder
        assert encoder.conv1.kernel_size == kernel
        assert type(encoder.maxpool) is pool


def test_probe_sends_no_gradient_back():
    model = train.Model("small", 32, "8", 4)
    _, logits = model(torch.randn(4, 3, 32, 32))
    logits.sum().backward()
    assert all(param.grad is None for param in model.encoder.parameters())
    assert model.probe.weight.grad is not None


def test_knn_and_linear_probe_know_clusters():
    torch.manual_seed(0)
    centres = torch.randn(6, 20)
    y, test_y = torch.arange(600) % 6, torch.arange(120) % 6
    x, test_x = (3 * centres[k] + 0.1 * torch.randn(len(k), 20) for k in (y, test_y))
    assert evaluation.knn(x, y, test_x, test_y, 6) == 100
    assert evaluation.linear_probe(x, y, test_x, test_y, 6, epochs=20) == (100, 100)
    assert evaluation.knn(x, y[torch.randperm(600)], test_x, test_y, 6) < 50


def plain_frossl(za, zb):
    """FroSSL of dimensions of mean 0 and norm 1."""
    za, zb = (standardized(z) / len(z) ** 0.5 for z in (za, zb))
    repulsion = sum((z.T @ z).square().sum().log() for z in (za, zb))
    return repulsion + (za - zb).square().sum() / len(za)


def test_readmes_loss_is_covered_by_the_tests(monkeypatch):
    readme = (HERE / "README.md").read_text()
    code = re.search(r"<!-- frossl -->\n```python\n(.*?)```", readme, re.S).group(1)
    monkeypatch.setattr(duality, "CRITERIA", dict(CRITERIA))
    namespace = dict(vars(duality))
    exec(code, namespace)
    frossl = namespace["frossl"]
    za, zb = (torch.randn(12, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(frossl(za, zb), plain_frossl(za, zb))
    for kind in DEGENERATE.values():
        zs = map(kind, two_views(6, 9, dtype=torch.float32))
        assert all(x.isfinite().all() for x in value_and_gradients(frossl, *zs))
    assert "frossl" in duality.CRITERIA


# --- Other devices -------------------------------------------------------------------------------


@pytest.fixture(params=ACCELERATORS or ["meta"])
def assert_same_on_device(request, monkeypatch):
    """Checks that function(tensors, device) does on an accelerator what it does on the CPU.

    Without an accelerator it checks devices and shapes, with meta tensors. These have no values
    and refuse to be mixed with the CPU's.
    """
    device = torch.device(request.param)

    def check(function, *tensors):
        there, here = (
            function([x.to(where) for x in tensors], where)
            for where in (device, torch.device("cpu"))
        )
        assert len(there) == len(here)
        for x, y in zip(there, here):
            assert x.device.type == device.type
            assert x.dtype == y.dtype
            assert x.shape == y.shape
            if device.type != "meta":
                torch.testing.assert_close(x.cpu(), y, rtol=1e-4, atol=1e-5)

    if device.type != "meta":
        yield check
    else:
        monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
        with FakeTensorMode():
            yield check


@every_criterion
@pytest.mark.parametrize("n, d", [(6, 30), (16, 5)])  # each log-sum-exp once whole, once in blocks
def test_criteria_on_other_devices(name, n, d, monkeypatch, assert_same_on_device):
    set_block(monkeypatch, 200)
    loss = loss_from_terms(name)
    zs = two_views(n, d, dtype=torch.float32)
    assert_same_on_device(lambda zs, device: value_and_gradients(loss, *zs), *zs)


def test_views_on_other_devices(assert_same_on_device):
    recipe = train.Views(24, blur=0.5, solarise=0.5)
    parameters = recipe.draw(6, 32, 40, generator=random_state(0))

    def apply_there(tensors, device):
        images, *values = tensors
        return [recipe.apply(images, dict(zip(parameters, values)))]

    def draw_there(tensors, device):  # other random numbers: only the device and shape are compared
        views = recipe(tensors[0][None])
        return [views[:, :, 0, 0] * 0]

    assert_same_on_device(apply_there, pictures(6, 32, 40), *parameters.values())
    assert_same_on_device(draw_there, pictures(6, 32, 40))


def test_lars_on_other_devices(assert_same_on_device):
    def two_steps(tensors, device):
        params = [x.clone().requires_grad_() for x in tensors]
        groups = [{"params": params[:2], "decay": 0, "eta": 0.02}, {"params": params[2:]}]
        optimizer = train.LARS(groups, 0.3, momentum=0.9)
        for _ in range(2):
            for param in params:
                param.grad = 1 + param.detach()
            optimizer.step()
        return [param.detach() for param in params]

    assert_same_on_device(two_steps, torch.ones(5, 4), torch.zeros(3, 3), torch.ones(6))


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")


def test_apples_gpu_is_for_one_process(two_processes, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train.choose_device("auto", 1) == torch.device("mps")
    assert train.choose_device("auto", 2) == torch.device("cpu")
    with pytest.raises(SystemExit) as end:
        train.choose_device("mps", 2)
    assert end.value.code == 2
    assert re.fullmatch(".*--device mps: .*only cpu\n", capsys.readouterr().err)


def test_evaluation_refuses_several_processes(two_processes, capsys):
    with pytest.raises(SystemExit) as end:
        evaluation.parse_args(["run"])
    assert end.value.code == 2
    assert "without torchrun" in capsys.readouterr().err


def test_each_process_of_a_node_has_its_gpu(two_processes, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank in range(2):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert train.choose_device("auto", 2) == torch.device("cuda", rank)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit) as end:
        train.choose_device("auto", 2)
    assert end.value.code == 2
    assert "--nproc-per-node" in capsys.readouterr().err


def test_memory_format_of_devices():
    formats = {kind: train.memory_format(torch.device(kind)) for kind in ("cpu", "cuda", "mps")}
    assert formats == {
        "cpu": torch.channels_last,
        "cuda": torch.channels_last,
        "mps": torch.contiguous_format,
    }


@pytest.mark.parametrize("emulated", [True, False])
def test_older_gpus_compute_in_fp16(emulated, monkeypatch):
    def is_bf16_supported(including_emulation=True):
        return including_emulation or not emulated

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert train.fastest_precision(torch.device("cuda", 0)) == ("fp16" if emulated else "bf16")


@pytest.mark.parametrize("kind, precision", [("cuda", "high"), ("cpu", "highest")])
def test_only_gpus_multiply_in_tf32(kind, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: kind == "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    before = torch.get_float32_matmul_precision()
    assert before == "highest"
    try:
        process = train.start(parse_train(f"--device {kind} --precision bf16"))
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert process.device.type == kind
    assert (process.rank, process.world, process.precision) == (0, 1, "bf16")
    process = train.start(parse_train(f"--device {kind} --precision fp32"))
    assert torch.get_float32_matmul_precision() == "highest"


def test_cores_are_those_of_this_process(monkeypatch):
    for allowed, local_processes, expected in (
        (6, 1, 6),
        (6, 2, 3),
        (6, 4, 1),
        (2, 4, 1),
        (64, 1, 8),
    ):
        monkeypatch.setattr(
            os, "sched_getaffinity", lambda _, n=allowed: set(range(n)), raising=False
        )
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_processes))
        assert train.cores() == expected
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert train.cores() == 3


def test_a_process_that_fails_says_its_rank(two_processes, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    for local_rank, expected in (("0", "rank 1: no\n"), ("1", "")):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(SystemExit):
            train.fail("no")
        assert capsys.readouterr().err.partition(": ")[2] == expected


# --- Programs ------------------------------------------------------------------------------------

TINY = "--image-size 8 --arch small --projector 16-16 --precision fp32 --device cpu --workers 0"
KILLS = 20 if os.environ.get("DUALITY_LONG") else 3
EPOCHS = 12 * (KILLS + 1)
STEPS = 5 * EPOCHS
SCRATCH = tempfile.TemporaryDirectory()


def be_program(line, output, start_method, largest_file=0, streamed=False):
    """Turns this process into the program, with its output in a file.

    largest_file limits the bytes of a file, as a full disk would. If streamed, train.py reads the
    images while it trains instead of holding them.
    """
    os.setpgrp()
    os.dup2(os.open(output, os.O_WRONLY), 1)
    os.dup2(1, 2)
    multiprocessing.set_start_method(start_method, force=True)
    if largest_file:
        import resource  # Windows has none

        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = shlex.split(line)
    try:
        if streamed:
            train.RESIDENT_BYTES = 0
            train.run_program(train.main)
        else:
            runpy.run_path(str(HERE / sys.argv[0]), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # as a program does, but not a process of multiprocessing


def run_program(line, until=None, signal_number=None, **options):
    """Runs a script of this repository; returns (exit status, output).

    With signal_number its process group gets that signal as soon as until() is true.
    The process is forked from a server that has imported torch already.
    """
    if os.name == "nt":
        pytest.skip("needs POSIX's signals and a forkserver")
    output = Path(tempfile.mkstemp(dir=SCRATCH.name)[1])
    start_method = multiprocessing.get_start_method()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "torchvision", "torch.distributed", "tqdm"])
    process = context.Process(target=be_program, args=(line, output, start_method), kwargs=options)
    process.start()
    if signal_number:
        while process.is_alive() and not until():
            time.sleep(0.005)
        os.killpg(process.pid, signal_number)
    process.join(300)
    return process.exitcode, output.read_text()


def run_to_the_end(line, **options):
    """The output of a script of this repository, which must succeed."""
    status, output = run_program(line, **options)
    assert status == 0, output
    return output


def run_command(words, **options):
    return subprocess.run(
        [sys.executable, *shlex.split(words)], capture_output=True, text=True, **options
    )


def torchrun(processes, line):
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node {processes}"
    return run_command(f"{launcher} {line}", timeout=300)


def file_contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def load_checkpoint(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def log_records(out):
    with open(out / "log.jsonl") as file:
        return [json.loads(line) for line in file]


def steps_seen(out):
    """The number of steps in the log of a run that is still at work."""
    log = out / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return 1 + max((record["step"] for record in records if "loss" in record), default=-1)


def run_until_step(step, line, out, signal_number, **options):
    """Runs train.py, sends it a signal when its log has a step; returns (exit status, output)."""
    return run_program(line, lambda: steps_seen(out) >= step, signal_number, **options)


def step_records(out):
    """The log's values of each step, which must be there once and in order, without statuses."""
    found = []
    for record in log_records(out):
        n = list(record).index("probe_train") + 1  # a status comes after it
        found.append(dict(list(record.items())[:n]))
    assert [record["step"] for record in found] == list(range(len(found)))
    return found


def assert_same_run(found_out, expected_out, tolerance=0.0):
    """Checks losses and weights; with tolerance 0, to the bit, the optimisers' states too."""
    found, expected = load_checkpoint(found_out), load_checkpoint(expected_out)
    assert found["step"] == expected["step"]
    one_sample = 100 / (2 * expected["settings"]["batch_size"]) if tolerance else 0
    rows, expected_rows = step_records(found_out), step_records(expected_out)
    assert len(rows) == len(expected_rows) == expected["step"]
    for row, expected_row in zip(rows, expected_rows):
        difference = row.pop("probe_train") - expected_row.pop("probe_train")
        assert abs(difference) <= 1.001 * one_sample
        assert row == pytest.approx(expected_row, rel=tolerance, abs=0)
    found, expected = found["states"], expected["states"]
    for name, weight in expected["model"].items():
        difference = (found["model"][name] - weight).double()
        if name.endswith(".bias"):  # a bias may begin at 0: its layer tells what is small
            weight = expected["model"][name.replace(".bias", ".weight")]
        assert difference.norm() <= tolerance * weight.double().norm(), name
    if not tolerance:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.fixture
def refused(capsys, monkeypatch):
    """Checks that train.py or eval.py ends with status 2 and one line, which has these words."""
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    mains = {"train.py": train.main, "eval.py": evaluation.main}

    def check(line, *words):
        program, *arguments = shlex.split(line)
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(SystemExit) as end:
            train.run_program(mains[program])
        message = capsys.readouterr().err
        assert end.value.code == 2, message
        assert re.fullmatch(rf"{program}: .*\n", message), message
        assert all(word in message for word in words), message
        return message

    return check


def save_image(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """A folder of two classes, 40 and 16 images of 12 x 10 pixels."""
    root = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for i in range(56):
        split = "train" if i < 40 else "test"
        label = i % 2
        name = ("a class", "второй класс")[label]
        pixels = draw.integers(0, 128, (10, 12, 3)) + 127 * label
        image = Image.fromarray(pixels.astype(np.uint8))
        save_image(image, root / split / name / f"{i} ä.png")
    return root


@pytest.fixture(scope="module")
def train_command(image_folder):
    """The command that trains on these images, in five steps an epoch."""

    def command(out, epochs=EPOCHS, more=""):
        data = f"--dataset folder --data-dir {image_folder} --batch-size 8"
        return f"train.py {data} {TINY} --out {out} --epochs {epochs} {more}"

    return command


def make_data(line):
    """train.py's data for a command line."""
    return train.Data(parse_train(line), train.Process(torch.device("cpu")))


def stream_images(monkeypatch):
    """Makes train.py read images while it trains, however few they are."""
    monkeypatch.setattr(train, "RESIDENT_BYTES", 0)


# --- Several processes ---------------------------------------------------------------------------


def update(net, criterion, optimizers, scaler, views, labels):
    """train.py's step, without autocast."""
    return train.update(net, criterion, optimizers, scaler, contextlib.nullcontext(), views, labels)


def model_and_batch():
    """A model with batch norms and 16 samples of two views, the same in every process."""
    torch.manual_seed(0)
    model = train.Model("small", 8, "12-7", 5)
    width = model.probe.in_features
    model.encoder = torch.nn.Sequential(
        torch.nn.Conv2d(3, width, 3, bias=False),
        torch.nn.BatchNorm2d(width),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
    )
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    view_a, view_b = 3 * torch.randn(2, 16, 3, 8, 8)
    return model, (view_a, view_b, torch.arange(16) % 5)


def gradients_and_statistics(model, scale=1.0):
    """By name: all gradients, over the scale, and what the batch norms remember."""
    found = {name: param.grad / scale for name, param in model.named_parameters()}
    return {**found, **{name: buffer.double() for name, buffer in model.named_buffers()}}


def step_gradients(rank=0, world=1):
    """{criterion: {name: gradient}} by train.py, from this process's share of the batch."""
    found = {}
    for name, criterion in CRITERIA.items():
        model, batch = model_and_batch()
        view_a, view_b, labels = (part.chunk(world)[rank] for part in batch)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        net = train.distribute(model, torch.device("cpu"))
        with mock.patch.object(scaler, "update"):  # which expects that an optimiser has stepped
            values, _ = update(
                net, criterion.terms, (), scaler, torch.cat((view_a, view_b)), labels
            )
        loss = values["loss"].detach()
        found[name] = {"loss": loss, **gradients_and_statistics(model, 1024)}
    return found


def plain_step_gradients():
    """The same of the whole batch, written out and in float64."""
    found = {}
    for name, criterion in CRITERIA.items():
        model, (view_a, view_b, labels) = model_and_batch()
        model.double()
        embeddings, logits = model(torch.cat((view_a, view_b)).double())
        loss = criterion(*embeddings.chunk(2))
        logits_a, logits_b = logits.chunk(2)
        probe_loss = (F.cross_entropy(logits_a, labels) + F.cross_entropy(logits_b, labels)) / 2
        (loss + probe_loss).backward()
        found[name] = {"loss": loss.detach(), **gradients_and_statistics(model)}
    return found


def assert_same_gradients(found, expected, tolerance):
    for name, exact in expected.items():
        assert found[name].keys() == exact.keys()
        for key, y in exact.items():
            assert (found[name][key] - y).norm() <= tolerance * y.norm(), (name, key)


class Watch(TorchDispatchMode):
    """Refuses what waits for a device or copies to it from the host, and float64, which Apple's
    GPUs do not have."""

    WAITING = (
        "_local_scalar_dense",
        "nonzero",
        "nonzero_static",
        "masked_select",
        "equal",
        "_unique2",
        "unique_dim",
        "bincount",
        "lift_fresh",  # torch.tensor of numbers
    )
    INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.WAITING, function
        if name in self.INDEXING:
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            assert not masks, function
            assert len(args) < 3 or args[2].ndim, function
        found = function(*args, **(kwargs or {}))
        assert not tree_any(self.is_float64, found), function
        return found

    @staticmethod
    def is_float64(x):
        return torch.is_tensor(x) and x.dtype == torch.float64


@every_criterion
def test_a_step_neither_waits_for_the_device_nor_needs_float64(name, train_command):
    more = f"--criterion {name} --optimizer lars --views blur=0.5 solarise=0.2"
    line = train_command(".", 1, more)
    data = make_data(line)
    model = train.Model("small", 8, "16-16", 2)
    optimizers = train.build_optimizers(parse_train(line), model)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with Watch():
        for views, labels in data.batches(0, 2):
            update(model, CRITERIA[name].terms, optimizers, scaler, views, labels)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: x * torch.tensor([2.0, 1.0]),
        lambda x: x.index_put_((torch.zeros(1, dtype=torch.long),), torch.ones(())),
        lambda x: bool((x > 0).all()),
        lambda x: x.double(),
    ],
)
def test_the_watch_refuses(wait):
    x = torch.ones(2)
    with pytest.raises(AssertionError), Watch():
        wait(x)


def test_a_step_has_the_gradients_of_criterion_and_probe():
    assert_same_gradients(step_gradients(), plain_step_gradients(), 1e-4)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_have_the_gradients_of_one(processes, tmp_path):
    result = torchrun(processes, f"{__file__} --worker gradients --out {tmp_path}")
    assert result.returncode == 0, result.stderr
    for rank in range(processes):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert_same_gradients(found, step_gradients(), 1e-5)


@pytest.mark.parametrize("optimizer, killed", [("lars --lr 0.3", False), ("adamw --lr 3e-4", True)])
def test_two_processes_train_as_one(optimizer, killed, train_command, tmp_path):
    more = f"--criterion simclr --optimizer {optimizer} --save-every 0"
    one, two = (train_command(tmp_path / name, 4, more) for name in ("one", "two"))
    run_to_the_end(one)
    if killed:
        # the process that lives on ends too, or torchrun's time is over
        result = torchrun(2, f"{__file__} --worker {two}")
        assert result.returncode != 0
        assert load_checkpoint(tmp_path / "two")["step"] == 5
    result = torchrun(2, f"{HERE}/{two}")  # starts, or goes on where the killed run stopped
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("2 x cpu fp32") == 1, result.stderr
    assert "Warning" not in result.stderr, result.stderr
    assert_same_run(tmp_path / "two", tmp_path / "one", 1e-5)


@pytest.mark.parametrize("batch, processes", [(63, 2), (2, 2), (6, 4)])
def test_a_batch_that_does_not_divide_is_refused(batch, processes, refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    line = f"train.py --dataset shapes --batch-size {batch} {TINY}"
    refused(line, f"--batch-size {batch}", str(processes))


def test_processes_that_torchrun_has_not_started_are_refused(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as some clusters set it
    refused(f"train.py --dataset shapes --device cpu {TINY}", "torchrun", "RANK")


def save_worker_gradients(args):
    train.start(args)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.save(step_gradients(rank, world), Path(args.out) / f"{rank}.pt")


def train_until_a_worker_is_killed(args):
    """A run whose second process kills itself at the first test after a save of some steps."""
    probe_accuracy = train.probe_accuracy
    out = Path(args.out)

    def die_or_test(*arguments):
        if os.environ["RANK"] == "1" and load_checkpoint(out)["step"] > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return probe_accuracy(*arguments)

    train.probe_accuracy = die_or_test
    train.train(args)


def run_worker(task, *words):
    """What torchrun starts in the tests above."""
    if task in ("dies", "fills the disk"):
        return end_alone(task, *words[1:])
    args = train.parse_args([*words, "--device", "cpu"])
    if task == "gradients":
        save_worker_gradients(args)
    else:
        train_until_a_worker_is_killed(args)


# --- Several nodes ------------------------------------------------------------------------------


def two_nodes(*lines):
    """[(exit status, output), ...] of two torchrun launchers of one process each, as on two nodes.

    The lines are their scripts and arguments. All must have ended within two minutes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launchers = []
    for rank, line in enumerate(lines):
        options = f"--nnodes 2 --node-rank {rank} --nproc-per-node 1"
        address = f"--master-addr 127.0.0.1 --master-port {port}"
        command = [sys.executable, "-m", "torch.distributed.run"]
        command += shlex.split(f"{options} {address} {line}")
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        launchers.append(subprocess.Popen(command, **pipes))
    try:
        outputs = [launcher.communicate(timeout=120)[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    return [(launcher.returncode, output) for launcher, output in zip(launchers, outputs)]


NODES_OPTIONS = "--criterion simclr --optimizer lars --lr 0.3"


@pytest.fixture(scope="module")
def one_process_run(train_command, tmp_path_factory):
    """The folder of a run of two epochs, stopped after the first."""
    out = tmp_path_factory.mktemp("one process")
    for epochs in (1, 2):
        run_to_the_end(train_command(f"'{out}'", epochs, NODES_OPTIONS))
    return out


@pytest.mark.parametrize("shared", (True, False))
def test_two_nodes_train_resume_and_find_the_run_complete(
    shared, one_process_run, train_command, tmp_path
):
    folders = [tmp_path / "node0", tmp_path / ("node0" if shared else "node1")]
    for epochs, said in ((1, "online probe"), (2, "online probe"), (2, "is complete")):
        lines = [f"{HERE}/{train_command(folder, epochs, NODES_OPTIONS)}" for folder in folders]
        for rank, (status, output) in enumerate(two_nodes(*lines)):
            assert status == 0, output
            assert output.count(said) == (rank == 0), output
        if epochs == 1:
            assert load_checkpoint(folders[0])["step"] == 5
    assert shared or not folders[1].exists()
    assert_same_run(folders[0], one_process_run, 1e-5)


def test_a_node_without_its_data_ends_both(train_command, tmp_path):
    line = f"{HERE}/{train_command(tmp_path, 1)}"
    ends = two_nodes(line, f"{line} --data-dir {tmp_path}/none")
    assert all(status != 0 for status, _ in ends), ends
    output = ends[0][1] + ends[1][1]
    reason = f"train.py: rank 1: [Errno 2] No such file or directory: '{tmp_path}/none/train'"
    assert output.count(reason) == 1, output
    assert "terminate called" not in output, output
    assert f'File "{HERE}/train.py"' not in output, output  # no traceback but the launchers' own


@pytest.mark.parametrize("task, said", (("dies", ""), ("fills the disk", "rank 0: stopped, what")))
def test_a_process_that_fails_alone_ends_both_nodes(task, said, train_command, tmp_path):
    line = f"{__file__} --worker '{task}' {train_command(tmp_path / 'run', 400)}"
    ends = two_nodes(line, line)
    assert all(status != 0 for status, _ in ends), ends
    assert said in ends[0][1], ends


def end_alone(task, *words):
    """What torchrun starts: training in which, after some steps, one process fails by itself."""
    look = train.Run.look

    def fail_or_look(self, done, *more):
        if done >= 10 and task == "dies" and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        if done >= 10 and task == "fills the disk" and os.environ["RANK"] == "0":
            full = OSError(28, "No space left on device")
            self.log = mock.Mock(write=mock.Mock(side_effect=full))
        return look(self, done, *more)

    train.Run.look = fail_or_look
    train.run_program(lambda: train.main(words))


class Turns:
    """A train.Process of which there are several, as threads, that meet where processes would."""

    def __init__(self, rank, barrier):
        self.rank, self.barrier = rank, barrier

    def wait(self):
        self.barrier.wait()


def test_data_are_loaded_by_one_process_then_by_one_of_each_node_then_by_all(monkeypatch):
    local, events = threading.local(), []
    barrier = threading.Barrier(6)

    def load(rank):
        events.append(("begins", rank))
        time.sleep(0.05)
        events.append(("ends", rank))
        return rank

    def process(rank):
        local.rank = rank % 2  # two processes on each of three nodes
        assert train.load_in_turn(rank, Turns(rank, barrier)) == rank

    monkeypatch.setattr(train, "load", load)
    monkeypatch.setattr(train, "environment", lambda name, default: local.rank)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        list(pool.map(process, range(6)))
    turns = [{rank for _, rank in events[i:j]} for i, j in ((0, 2), (2, 6), (6, 12))]
    assert turns == [{0}, {2, 4}, {1, 3, 5}]


def test_processes_wait_for_downloads_longer_than_for_each_other(monkeypatch):
    groups = mock.Mock()
    monkeypatch.setattr(torch.distributed, "init_process_group", groups.default)
    monkeypatch.setattr(torch.distributed, "new_group", groups.control)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    process = train.start(parse_train("--dataset shapes --device cpu"))
    assert process.control is groups.control.return_value and (process.rank, process.world) == (
        1,
        2,
    )
    assert groups.control.call_args.kwargs["timeout"].total_seconds() > 12 * 3600


# --- Interrupted runs ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(train_command, tmp_path_factory):
    """The folder of a run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run_to_the_end(train_command(out))
    return out


def test_killed_runs_go_on_to_the_same_weights(train_command, whole_run, tmp_path):
    out = tmp_path / "run"
    line = train_command(out, more="--save-every 0")
    draw = random.Random(0)
    for _ in range(KILLS):
        step = steps_seen(out) + draw.randrange(10, 40)
        status, output = run_until_step(step, line, out, signal.SIGKILL)
        assert status == -signal.SIGKILL, output
    # as if it had been killed while it wrote
    saved = out / "checkpoint.pt"
    saved.with_name("checkpoint.pt.part").write_bytes(saved.read_bytes()[:999])
    assert 0 < load_checkpoint(out)["step"] < STEPS
    run_to_the_end(line)
    assert_same_run(out, whole_run)


def test_interrupted_runs_save_and_go_on_to_the_same_weights(train_command, whole_run, tmp_path):
    line = train_command(tmp_path)
    draw = random.Random(1)
    step = 0
    for number, expected_status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        wanted_step = step + draw.randrange(5, 40)
        status, output = run_until_step(wanted_step, line, tmp_path, number)
        step = load_checkpoint(tmp_path)["step"]
        assert status == expected_status, output
        assert f"after step {step};" in output
        assert "same command" in output
        assert "Traceback" not in output
        assert wanted_step <= step < STEPS
    run_to_the_end(line)
    assert_same_run(tmp_path, whole_run)


def test_an_interrupt_before_the_first_step_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(train, "load", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit) as end:
        train.run_program(partial(train.main, ["--dataset", "shapes", "--device", "cpu"]))
    assert end.value.code == 130
    assert re.fullmatch(".*interrupted\n", capsys.readouterr().err)


def test_a_signal_to_all_processes_does_not_end_the_workers_before_the_run(train_command, tmp_path):
    out = tmp_path / "run"
    line = train_command(out, 24, "--workers 2")
    status, output = run_until_step(12, line, out, signal.SIGTERM, streamed=True)
    assert status == 143, output
    assert 12 <= load_checkpoint(out)["step"] < 120, output
    run_to_the_end(line, streamed=True)
    run_to_the_end(train_command(tmp_path / "whole", 24), streamed=True)
    assert_same_run(out, tmp_path / "whole")


@pytest.fixture
def complete_run(whole_run, tmp_path):
    """A copy of a complete run's folder."""
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


@pytest.mark.parametrize("damage", ["empty", "half", "text", "changed", "weights", "nothing"])
def test_a_damaged_checkpoint_is_named_and_nothing_overwritten(
    damage, complete_run, train_command, refused
):
    path = complete_run / "checkpoint.pt"
    good = path.read_bytes()
    if damage == "weights":
        torch.save({"fc": torch.zeros(2)}, path)
    elif damage == "nothing":
        torch.save({}, path)
    else:
        damaged = {
            "empty": b"",
            "half": good[: len(good) // 2],
            "text": b"text",
            "changed": bytes(99) + good[99:],
        }
        path.write_bytes(damaged[damage])
    before = file_contents(complete_run)
    refused(train_command(complete_run, EPOCHS + 1), "checkpoint.pt is damaged")
    assert file_contents(complete_run) == before


@pytest.mark.parametrize(
    "more, names",
    [
        ("--criterion simclr", ["criterion"]),
        ("--projector 32", ["projector"]),
        ("--arch resnet18", ["arch"]),
        ("--set covariance=2", ["set", "covariance"]),
        ("--views hue=0", ["views", "hue"]),
        ("--seed 1", ["seed"]),
        ("--lr 1", ["lr"]),
        ("--batch-size 4", ["batch_size"]),
    ],
)
def test_other_settings_are_refused(more, names, complete_run, train_command, refused):
    before = file_contents(complete_run)
    refused(train_command(complete_run, EPOCHS + 1, more), *names)
    assert file_contents(complete_run) == before


def test_a_run_that_has_just_begun_refuses_other_settings(train_command, refused, tmp_path):
    line = train_command(tmp_path)
    status, output = run_program(line, (tmp_path / "checkpoint.pt").exists, signal.SIGKILL)
    assert status == -signal.SIGKILL, output
    assert load_checkpoint(tmp_path)["step"] == 0
    refused(f"{line} --seed 1", "seed 0, not 1")


def test_a_run_moves_between_precisions_data_and_folders(train_command, image_folder, tmp_path):
    images = shutil.copytree(image_folder, tmp_path / "images")
    out = tmp_path / "run"
    for epochs, precision in enumerate(("fp32", "fp16", "bf16", "fp32"), 1):
        more = f"--precision {precision} --data-dir {images if epochs > 1 else image_folder}"
        output = run_to_the_end(train_command(out, epochs, f"{more} --save-every {epochs}"))
        assert f"1 x cpu {precision}" in output
        assert load_checkpoint(out)["step"] == 5 * epochs
        assert bool(load_checkpoint(out)["states"]["scaler"]) == (precision == "fp16")
        if epochs == 2:
            out = out.rename(tmp_path / "moved")
    assert len(step_records(out)) == 20


def test_other_images_are_refused_to_train_but_not_to_evaluate(
    train_command, image_folder, refused, tmp_path
):
    unlabelled = Path(shutil.copytree(image_folder, tmp_path / "images"))
    for path in [*unlabelled.glob("*/второй класс/*")]:
        path.rename(path.parent.parent / "a class" / path.name)
    for path in [*unlabelled.glob("*/второй класс")]:
        path.rmdir()
    out = tmp_path / "run"
    run_to_the_end(train_command(out, 1, f"--data-dir {unlabelled}"))
    refused(train_command(out, 2, f"--data-dir {image_folder}"), "classes 1, not 2", "--out")
    for name in ("0 ä.png", "2 ä.png"):
        (unlabelled / "train" / "a class" / name).unlink()
    refused(train_command(out, 2, f"--data-dir {unlabelled}"), "images 40, not 38", "--out")
    run_to_the_end(f"eval.py {out} --epochs 5 --data-dir {image_folder}")
    assert json.loads((out / "eval.json").read_text())["linear_top5"] == 100


def test_evaluation_needs_fewer_images_than_a_batch(train_command, image_folder, tmp_path):
    few = Path(shutil.copytree(image_folder, tmp_path / "few"))
    for path in few.glob("train/*/1*.png"):
        path.unlink()
    assert 0 < len([*few.glob("train/*/*")]) < 40
    out = tmp_path / "run"
    run_to_the_end(train_command(out, 1, "--batch-size 40"))
    run_to_the_end(f"eval.py {out} --epochs 5 --data-dir {few}")


def test_a_result_that_cannot_be_shown_is_kept(train_command, tmp_path, monkeypatch):
    out = tmp_path / "日"
    run_to_the_end(train_command(out, 1))
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    assert run_command(f"eval.py {out} --epochs 5").returncode == 1
    assert "linear_top1" in json.loads((out / "eval.json").read_text())


@pytest.mark.parametrize("wanted", [torch.contiguous_format, torch.channels_last])
def test_network_and_views_have_the_devices_memory_format(
    wanted, train_command, tmp_path, monkeypatch
):
    seen = []
    monkeypatch.setattr(train, "memory_format", lambda device: wanted)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    train_update, evaluation_extract = train.update, evaluation.extract

    def watch_update(net, criterion, optimizers, scaler, autocast, views, labels):
        seen.append((views, net))
        return train_update(net, criterion, optimizers, scaler, autocast, views, labels)

    def watch_extract(encoder, data, split):
        seen.append((next(data.plain(split))[0], encoder))
        return evaluation_extract(encoder, data, split)

    monkeypatch.setattr(train, "update", watch_update)
    monkeypatch.setattr(evaluation, "extract", watch_extract)
    train.main(shlex.split(train_command(tmp_path, 1))[1:])
    args = evaluation.parse_args([str(tmp_path), "--device", "cpu", "--epochs", "1"])
    evaluation.evaluate(tmp_path, args)
    assert len(seen) == 5 + 2
    for views, net in seen:
        weights = [m.weight for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
        assert all(x.is_contiguous(memory_format=wanted) for x in (views, *weights))


def test_more_epochs_go_on_and_a_complete_run_is_left_alone(complete_run, train_command):
    before = file_contents(complete_run)
    assert "complete" in run_to_the_end(train_command(complete_run))
    assert file_contents(complete_run) == before
    run_to_the_end(train_command(complete_run, EPOCHS + 1))
    assert len(step_records(complete_run)) == STEPS + 5
    assert file_contents(complete_run)["log.jsonl"].startswith(before["log.jsonl"])
    (complete_run / "log.jsonl").unlink()
    line = train_command(complete_run, EPOCHS + 2)
    run_until_step(STEPS + 5, f"{line} --save-every 99", complete_run, signal.SIGKILL)
    run_to_the_end(line)
    steps = [record["step"] for record in log_records(complete_run)]
    assert steps == list(range(STEPS + 5, STEPS + 10))


@pytest.mark.parametrize("largest_file", [0, 1_000_000, 3_000_000])
def test_a_full_disk_leaves_the_checkpoint(largest_file, complete_run, train_command):
    # what does not fit is the log (0: a few bytes more than it has), the encoder, the checkpoint
    before = file_contents(complete_run)
    largest_file = largest_file or len(before["log.jsonl"]) + 9
    line = train_command(complete_run, EPOCHS + 1)
    status, output = run_program(line, largest_file=largest_file)
    assert status == 2, output
    assert len(re.findall("saved is intact|Traceback|ignored", output)) == 1, output
    assert file_contents(complete_run)["checkpoint.pt"] == before["checkpoint.pt"]
    assert not list(complete_run.glob("*.part"))
    run_to_the_end(line)
    assert len(step_records(complete_run)) == STEPS + 5


def test_a_loss_that_is_not_finite_stops_the_run(train_command, tmp_path):
    more = "--optimizer sgd --warmup 0 --batch-size 40 --lr 1e9"  # one step an epoch
    run_to_the_end(train_command(tmp_path, 1, more))
    before = file_contents(tmp_path)
    status, output = run_program(train_command(tmp_path, 9, more))
    assert status == 1, output
    assert re.search(r"variance\b.* (nan|inf) at step 1\b", output), output
    assert file_contents(tmp_path)["checkpoint.pt"] == before["checkpoint.pt"]


def test_embeddings_that_are_not_finite_stop_the_run(train_command, tmp_path):
    # the first test and diagnosis come after step 4, when the embeddings are not finite either
    line = train_command(tmp_path, 1, "--optimizer sgd --warmup 0 --lr 1e9")
    status, output = run_program(line)
    assert status == 1, output
    assert re.search(r" (nan|inf) at step [12]\b", output), output
    assert "Traceback" not in output, output
    assert file_contents(tmp_path)["log.jsonl"] == b""


def test_weights_that_are_not_finite_are_not_saved(train_command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    calls = []

    def fragile(za, zb):
        """Finite, but from the eleventh call on, in step 9, with the gradient 0 / 0."""
        calls.append(za)
        surprise = (0 * za.sum()) ** (0.5 if len(calls) > 10 else 1)
        return {"invariance": F.mse_loss(za, zb), "surprise": surprise}

    monkeypatch.setitem(CRITERIA, "fragile", None)  # removed after the test
    duality.criterion(fragile)
    with pytest.raises(SystemExit) as end:
        train.train(parse_train(train_command(tmp_path, 4, "--criterion fragile --save-every 0")))
    assert end.value.code == 1
    assert "weights are not finite after step 9" in capsys.readouterr().err
    assert load_checkpoint(tmp_path)["step"] == 5
    assert len(calls) == 11


# --- Bad input -----------------------------------------------------------------------------------

BAD_FLAGS = [
    "--foo 1",
    "--criterion foo",
    "--dataset foo",
    "--arch foo",
    "--optimizer foo",
    "--precision foo",
    "--device foo",
    "--set foo=1",
    "--set za=1",
    "--set temperature=1",
    "--set covariance=x",
    "--set covariance",
    "--set covariance=nan",
    "--set covariance=inf",
    "--set covariance=1e400",
    "--criterion tcr --set eps=0",
    "--criterion dcl --set negatives=foo",
    "--criterion simclr --set temperature=-1",
    "--criterion simclr --set temperature=0",
    "--criterion chain --set t=nan",
    "--criterion simclr --set temperature=inf",
    "--criterion chain --set t=7",
    "--epochs 0",
    "--views foo=1",
    "--views image_size=9",
    "--views grey=7",
    "--views crop=-1",
    "--views hue=nan",
    "--views hue=x",
    "--epochs -3",
    "--batch-size 1",
    "--batch-size 0",
    "--batch-size x",
    "--batch-size 2.5",
    "--lr 0",
    "--lr -1",
    "--lr x",
    "--lr nan",
    "--lr inf",
    "--weight-decay -1",
    "--weight-decay nan",
    "--warmup 2",
    "--warmup -1",
    "--save-every -1",
    "--save-every nan",
    "--workers -1",
    "--projector 0",
    "--projector 12--3",
    "--projector abc",
    "--projector 16-",
    "--projector 99999999999",
    "--seed -1",
    "--seed x",
    "--projector 9999999-16",
    "--image-size 4",
    "--image-size 99999",
]


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_end_in_one_line(flags, refused, tmp_path):
    line = f"train.py --dataset shapes --device cpu --out {tmp_path / 'run'} {flags}"
    message = refused(line)
    flag_and_name = re.split("[ =]", flags)[-3:-1]  # what precedes the last value
    assert any(word in message for word in flag_and_name), message
    assert not list(tmp_path.iterdir()), message


def test_help_says_the_defaults(monkeypatch, capsys):
    parsers = []
    print_help = argparse.ArgumentParser.print_help

    def keep_and_print(parser):
        parsers.append(parser)
        print_help(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "print_help", keep_and_print)
    with pytest.raises(SystemExit) as end:
        train.parse_args(["-h"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    (parser,) = parsers
    datasets = [f"--dataset {dataset}" for dataset in train.DATASETS]
    archs = ["", " --arch small"]
    optimizers = ["", " --optimizer adamw", " --optimizer sgd"]
    lines = map("".join, itertools.product(datasets, archs, optimizers))
    for line, action in itertools.product(lines, parser._actions):
        settings = parse_train(line)
        name = action.dest
        if name in ("help", "compile", "profile", "set", "views"):  # these have no default to tell
            continue
        assert action.option_strings[0] in shown
        told, *cases = re.split("default: ", action.help)[1].split(", ")
        for case in cases:
            *kinds, value = case.replace(" and ", " ").split()
            ours = settings.dataset, settings.arch.replace("resnet", ""), settings.optimizer
            if set(kinds) & set(ours) and f"--{name}" not in line:
                told = value
        setting = getattr(settings, name)
        if name == "out":
            assert setting == told.replace("DATASET", settings.dataset).replace(
                "CRITERION", "vicreg"
            )
        elif name == "workers":
            assert (told, setting) == ("one per core", train.cores())
        elif f"--{name}" not in line:
            assert type(setting)(told) == setting, (name, line)
    assert parse_train("").dataset in shown


def test_features_and_labels_are_on_one_device():
    class Files:
        sets = {"train": (None, torch.arange(4))}  # a streamed set's labels are on the CPU

        def plain(self, split):
            yield torch.ones(4, 3, device="meta"), torch.arange(4, device="meta")

    features, labels = evaluation.extract(torch.nn.Identity(), Files(), "train")
    assert features.device == labels.device == torch.device("meta")


def test_settings_may_be_given_in_parts():
    args = parse_train("--set covariance=2 invariance=5 --views hue=0 --set covariance=4")
    assert args.set == {"covariance": 4, "invariance": 5}
    assert args.views == {"hue": 0}


def test_settings_of_a_new_criterion(monkeypatch, capsys):
    def mine(za, zb, symmetric=True, weight=25, kind="a"):
        return za.sum()

    monkeypatch.setitem(CRITERIA, "mine", mine)
    line = "--criterion mine --set weight=2.5 kind=1 symmetric="
    assert parse_train(f"{line}0").set == {"weight": 2.5, "kind": "1", "symmetric": 0}
    with pytest.raises(SystemExit, match="2"):
        parse_train(f"{line}False")
    assert "symmetric=True, weight=25, kind=a" in capsys.readouterr().err


def test_what_is_not_there_is_named(train_command, refused, tmp_path, monkeypatch):
    refused(train_command("/dev/null/run"), "/dev/null/run")
    refused(train_command(tmp_path, 1, "--batch-size 41"), "--batch-size 41", "40")
    for kind in {"cuda", "mps"}.difference(ACCELERATORS):
        refused(train_command(tmp_path, 1, f"--device {kind}"), kind, "cpu")
    missing = f"{tmp_path}/none"
    refused(train_command(tmp_path, 1, f"--data-dir {missing}"), missing, "--data-dir")
    no_network = mock.Mock(side_effect=urllib.error.URLError("Name or service not known"))
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    line = f"train.py --dataset cifar10 --data-dir {tmp_path}"
    refused(line, "--data-dir", "shapes", "service not known")


@pytest.mark.parametrize(
    "line, reason",
    [
        ("train.py --criterion foo", "foo"),
        ("eval.py", "RUN"),
        ("eval.py {0}/none", "no checkpoint.pt"),
        ("eval.py {0}", "damaged"),
        ("eval.py {0} --k 0", "--k 0"),
        ("eval.py {0} --workers -1", "--workers -1"),
    ],
)
def test_programs_end_in_one_line(line, reason, tmp_path):
    (tmp_path / "checkpoint.pt").write_text("garbage")
    status, output = run_program(line.format(tmp_path))
    assert status == 2, output
    assert re.fullmatch(rf"{line.split()[0]}: .*{reason}.*\n", output), output


@pytest.mark.parametrize("epochs", [1, 12])  # 5 and 60 steps
def test_profiles_save_nothing(epochs, train_command, tmp_path):
    output = run_to_the_end(train_command(tmp_path / "run", epochs, "--profile"))
    assert all(word in output for word in ("network", "criterion", "views")), output
    assert not (tmp_path / "run").exists()


# --- Folders of images ---------------------------------------------------------------------------


@pytest.fixture
def damaged_folder(image_folder, tmp_path):
    """A copy of the folder of images, and the names of its two damaged files."""
    root = Path(shutil.copytree(image_folder, tmp_path / "images"))
    first, second = (root / "train" / "a class" / f"{i} ä.png" for i in (0, 2))
    first.write_text("no image")
    second.write_bytes(second.read_bytes()[:100])
    return root, {str(first), str(second)}


def test_images_of_all_kinds_are_read(train_command, tmp_path):
    colour = Image.new("RGB", (40, 30), (200, 100, 50))
    kinds = {f"{mode}.png": colour.convert(mode) for mode in ("RGB", "L", "RGBA", "LA", "1")}
    kinds["CMYK.jpg"] = colour.convert("CMYK")
    kinds["P.png"] = colour.quantize(2)
    kinds["1x1.png"] = colour.resize((1, 1))
    kinds["16 bits L.png"] = Image.fromarray(np.full((30, 40), 256 * 124 + 99, np.uint16))
    kinds["wide 写真.png"] = colour.resize((30_000, 1))
    kinds["высокий.jpg"] = colour.resize((1, 30_000))
    for split in ("train", "val"):
        for name, image in kinds.items():
            save_image(image, tmp_path / split / "a class" / name)
    images, _ = make_data(train_command(".", 1, f"--data-dir {tmp_path}")).sets["train"]
    assert len(images) == len(kinds)
    for name, image in zip(sorted(kinds), images):
        expected = (124, 124, 124) if "L" in name else (200, 100, 50)
        difference = image - torch.tensor(expected)[:, None, None]
        if name != "1.png":  # black and white, dithered
            assert difference.abs().max() <= 6, name


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_from_its_archive(name, tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    dataset = getattr(torchvision.datasets, name.upper())
    images, labels = pictures(8), list(range(8))
    content = {
        "data": images.flatten(1).numpy(),
        "labels": labels,
        "fine_labels": labels,
        "coarse_labels": [0] * 8,
        dataset.meta["key"]: [f"class {label}" for label in labels],
    }
    folder = tmp_path / dataset.base_folder
    folder.mkdir()
    files = [file for file, _ in dataset.train_list + dataset.test_list]
    for file in (*files, dataset.meta["filename"]):
        (folder / file).write_bytes(pickle.dumps(content))
    data = make_data(f"train.py --dataset {name} --data-dir {tmp_path} --batch-size 8")
    lists = dataset.train_list, dataset.test_list
    for (found, targets), files in zip(data.sets.values(), lists):
        assert torch.equal(found, images.repeat(len(files), 1, 1, 1))
        assert targets.tolist() == labels * len(files)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_named_and_replaced(
    streamed, workers, damaged_folder, train_command, tmp_path
):
    root, damaged = damaged_folder
    line = train_command(tmp_path / "run", 2, f"--data-dir {root} --workers {workers}")
    output = run_to_the_end(line, streamed=streamed)
    for path in damaged:
        assert 1 <= output.count(f"{path} cannot be read") <= max(1, workers * streamed), output


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_are_lost_stop_the_run(
    streamed, workers, image_folder, train_command, tmp_path
):
    root = Path(shutil.copytree(image_folder, tmp_path / "images"))
    lost = root / "train" / "a class" / "lost ä.png"
    lost.symlink_to(tmp_path / "nowhere")
    line = train_command(tmp_path / "run", 2, f"--data-dir {root} --workers {workers}")
    status, output = run_program(line, streamed=streamed)
    assert status == 2, output
    reason = f"No such file or directory: '{lost}'"
    assert re.search(f"train.py: stopped, what was saved is intact: .*{reason}", output), output
    assert "Traceback" not in output


def test_empty_classes_are_named(train_command, refused, image_folder, tmp_path):
    root = Path(shutil.copytree(image_folder, tmp_path / "images"))
    (root / "train" / "empty class").mkdir()
    refused(train_command(tmp_path / "run", 1, f"--data-dir {root}"), "empty class")


def test_streamed_batches_resume_the_same(train_command, monkeypatch):
    stream_images(monkeypatch)
    line = train_command(".", 1, "--seed 999999999")
    by_itself, by_workers, resumed = (make_data(f"{line} --workers {n}") for n in (0, 2, 0))
    batches = list(by_itself.batches(0, 10))
    assert_identical = partial(torch.testing.assert_close, rtol=0, atol=0)
    assert_identical(batches, list(by_workers.batches(0, 10)))
    assert_identical(batches[7:], list(resumed.batches(7, 10)))
    view_a, view_b = batches[0][0].chunk(2)
    assert not torch.equal(view_a, view_b)
    first_epoch = torch.cat([labels for _, labels in batches[:5]])
    assert first_epoch.bincount().tolist() == [20, 20]


def test_more_processes_than_test_images(image_folder, monkeypatch):
    stream_images(monkeypatch)
    data = make_data(f"train.py --dataset folder --data-dir {image_folder} {TINY} --batch-size 8")
    n = len(data.sets["test"][1])
    found = []
    for rank in range(n + 2):
        data.process = train.Process(torch.device("cpu"), rank=rank, world=n + 2)
        found.append([len(labels) for _, labels in data.plain("test")])
        data.loaders.clear()  # each process has its own
    assert found == n * [[1]] + 2 * [[]]


@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_files_are_read_in_batches(damaged_folder):
    root, damaged = damaged_folder
    files = train.Files(root / "train", 8, 0.2)
    indices = torch.tensor([3, 0, 30])
    for seed, k in ((None, 1), (7, 2)):
        crops, labels = files[indices, seed]
        assert crops.shape == (k, 3, 3, 8, 8)
        assert crops.dtype == torch.uint8
        assert labels.tolist() == [0, 0, 1]
        assert os.fsdecode(files.paths[0]) in damaged
        assert (crops[:, 1] == 128).all()
        assert crops[:, 0].unique().numel() > 1
        torch.testing.assert_close(files[indices, seed][0], crops, rtol=0, atol=0)


def test_reading_all_images_makes_one_tensor(image_folder, monkeypatch):
    files = train.Files(image_folder / "train", 8, 0.2)
    expected = torch.cat([files[torch.tensor([i]), None][0][0] for i in range(len(files))])
    monkeypatch.setattr(torch, "cat", mock.Mock(side_effect=AssertionError("a second copy")))
    images, labels = files.read_all(workers=0)
    assert torch.equal(images, expected)
    assert torch.equal(labels, files.labels)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_streamed_run_makes_one_pool_a_set(method, train_command, tmp_path, monkeypatch):
    stream_images(monkeypatch)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    iterator = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    make, pools = iterator.__init__, []

    def count_and_make(self, loader):
        pools.append(loader.multiprocessing_context)
        make(self, loader)

    monkeypatch.setattr(iterator, "__init__", count_and_make)
    usual = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        train.main(shlex.split(train_command(tmp_path, 3, "--workers 1"))[1:])
    finally:
        multiprocessing.set_start_method(usual, force=True)
    assert len(step_records(tmp_path)) == 15
    assert len(pools) == 2
    if sys.platform == "linux":
        assert all(pool.get_start_method() == "fork" for pool in pools)


def test_an_evaluation_ends_its_image_readers(train_command, tmp_path, monkeypatch):
    stream_images(monkeypatch)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    train.main(shlex.split(train_command(tmp_path, 1))[1:])
    before = set(multiprocessing.active_children())
    line = f"eval.py {tmp_path} --workers 1 --epochs 1"
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    evaluation.main()
    assert set(multiprocessing.active_children()) == before


# --- Training and evaluation, written out --------------------------------------------------------


def save_red_images(folder):
    """20 images for training and 20 for testing. The red channel of image i is 10 i."""
    for i, image in enumerate(pictures(20, 40, 24)):
        image[0] = 10 * i
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        for split in ("train", "val"):
            save_image(picture, folder / split / str(i % 2) / f"{i}.png")


def images_shown(line):
    """Which images three epochs of three steps show, (3, 18), and all their different views."""
    data = make_data(line)
    shown, views_seen = [], []
    for views, labels in data.batches(0, 9):
        red = 25.5 * unnormalized(views)[:, 0]
        which, which_b = red.mean((1, 2)).round().chunk(2)
        assert torch.equal(which, which_b)
        assert (red - which.repeat(2)[:, None, None]).abs().max() < 0.1
        assert torch.equal(which % 2, labels)
        shown.append(which)
        views_seen.append(views)
    return torch.stack(shown).view(3, 18), torch.cat(views_seen).flatten(1).unique(dim=0)


@pytest.mark.parametrize("held", [True, False])
def test_an_epoch_has_each_image_once_in_two_views_of_it(held, monkeypatch, tmp_path):
    save_red_images(tmp_path)
    if not held:
        stream_images(monkeypatch)
    line = (
        f"train.py --dataset folder --data-dir {tmp_path} --batch-size 6 --image-size 8"
        " --workers 0 --views flip=0 jitter=0 grey=0"
    )
    epochs, views_seen = images_shown(line)
    assert all(len(epoch.unique()) == 18 for epoch in epochs)
    assert len(views_seen) == 108
    # each epoch has its own order, and so has each seed
    other_epochs, _ = images_shown(f"{line} --seed 1")
    assert len(torch.cat((epochs, other_epochs)).unique(dim=0)) == 6
    # with whole images all views are alike
    epochs, views_seen = images_shown(f"{line} crop=1")
    assert len(views_seen) == len(epochs.unique())


@cache
def small_shapes(split):
    """Normalised images of 8 pixels and their labels, as train.py makes them for TINY."""
    seeds = {"train": range(10), "test": range(10, 14)}[split]
    images, labels = zip(*(train.shapes(500, seed) for seed in seeds))
    images = torch.cat(images) / 255
    images = F.interpolate(images, size=8, mode="bilinear", antialias=True)
    return TF.normalize(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), torch.cat(labels)


def outputs_on_shapes(model, split):
    """Features, embeddings, logits and labels of the shapes, by a model in evaluation."""
    images, labels = small_shapes(split)
    with torch.no_grad():
        features = model.eval().encoder(images)
        return features, model.projector(features), model.probe(features), labels


def accuracy(logits, labels):
    return (logits.argmax(1) == labels).double().mean().item()


def untrained_model():
    torch.manual_seed(3)
    model = train.Model("small", 8, "32-16", 8)
    return model.to(memory_format=torch.channels_last)  # as train.py's on a CPU


def plain_optimizers(model):
    parameters = [*model.encoder.parameters(), *model.projector.parameters()]
    weights = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01}
    biases = {"params": [p for p in parameters if p.ndim <= 1]}
    main = torch.optim.SGD([weights, biases], momentum=0.9)
    probe = torch.optim.AdamW(model.probe.parameters(), 1e-2, weight_decay=0)
    return main, probe


def plain_learning_rate(step):
    """Two steps of warmup, six of a cosine."""
    if step < 2:
        factor = (step + 1) / 2
    else:
        factor = (1 + math.cos(math.pi * (step - 2) / 6)) / 2
    return 0.2 * 2500 / 256 * factor


@pytest.fixture(scope="module")
def run_and_plain_loop(tmp_path_factory):
    """A run's folder; of the same run written out: model, (loss, accuracy) of steps, test top-1."""
    out = tmp_path_factory.mktemp("plain")
    line = (
        f"train.py --dataset shapes {TINY} --projector 32-16 --criterion simclr"
        " --set temperature=0.5 --epochs 4 --batch-size 2500 --optimizer sgd --lr 0.2"
        f" --weight-decay 0.01 --warmup 0.2 --seed 3 --out {out}"
    )
    run_to_the_end(line)
    data = make_data(line)
    model = untrained_model()
    main, probe = plain_optimizers(model)
    rows, tests = [], []
    for step, (views, labels) in enumerate(data.batches(0, 8)):
        for group in main.param_groups:
            group["lr"] = plain_learning_rate(step)
        embeddings, logits = model.train()(views)
        loss = duality.simclr(*embeddings.chunk(2), temperature=0.5)
        labels = torch.cat((labels, labels))
        (loss + F.cross_entropy(logits, labels)).backward()
        for optimizer in (main, probe):
            optimizer.step()
            optimizer.zero_grad()
        rows.append((loss.item(), accuracy(logits, labels)))
        if step % 2:  # an epoch ends
            _, _, logits, labels = outputs_on_shapes(model, "test")
            tests.append(100 * accuracy(logits, labels))
    return out, model, rows, tests


def test_a_run_is_its_plain_loop(run_and_plain_loop):
    out, model, rows, tests = run_and_plain_loop
    found = [(record["loss"], record["probe_train"] / 100) for record in step_records(out)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(rows), rtol=1e-4, atol=2e-3)
    found_tests = [r["probe_test"] for r in log_records(out) if "probe_test" in r]
    assert found_tests == pytest.approx(tests, abs=0.2)
    weights = load_checkpoint(out)["states"]["model"]
    torch.testing.assert_close(weights, dict(model.state_dict()), rtol=1e-3, atol=1e-4)
    for name, weight in torch.load(out / "encoder.pt").items():
        assert torch.equal(weight, weights[f"encoder.{name}"])


def losses(out):
    return [record["loss"] for record in step_records(out)]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_in_half_precision_is_near_float32s(precision, tmp_path):
    for p in (precision, "fp32"):
        run_to_the_end(
            f"train.py --dataset shapes {TINY} --projector 32-32 --batch-size 500 --warmup 0"
            f" --epochs 1 --precision {p} --out {tmp_path / p}"
        )
    found, expected = losses(tmp_path / precision), losses(tmp_path / "fp32")
    assert found != expected
    assert found[-1] < found[0] - 2
    assert found[:3] == pytest.approx(expected[:3], rel=5e-3)
    assert found == pytest.approx(expected, rel=1e-2)


def plain_rankme(values):
    spectrum = torch.linalg.svdvals(values)
    return torch.special.entr(spectrum / spectrum.sum()).sum().exp()


def plain_knn(x, y, test_x, test_y):
    """Top-1 of 7 nearest neighbours among 8 classes, in %."""
    similarities, indices = (unit(test_x) @ unit(x).T).sort(descending=True)
    votes = torch.zeros(len(test_x), 8)
    for similarity, index in zip(similarities.T[:7], indices.T[:7]):
        votes += F.one_hot(y[index], 8) * (similarity / 0.07).exp()[:, None]
    return 100 * accuracy(votes, test_y)


def plain_evaluation(model):
    x, _, _, y = outputs_on_shapes(model, "train")
    test_x, z, _, test_y = outputs_on_shapes(model, "test")
    top1, top5 = evaluation.linear_probe(x, y, test_x, test_y, 8, epochs=3)
    cosines = off_diagonal_by_mask(unit(z) @ unit(z).T)
    norms4_of_dimensions = unit(z).square().sum(0).square().sum()
    return {
        "rankme": plain_rankme(test_x),
        "rankme_embeddings": plain_rankme(z),
        "knn_top1": plain_knn(x, y, test_x, test_y),
        "linear_top1": top1,
        "linear_top5": top5,
        "negative_mean": cosines.mean(),
        "negative_variance_times_d": 16 * cosines.var(),
        "norms4_over_least": norms4_of_dimensions / (2000**2 / 16),
        "norms4_most_over_least": 16.0,
    }


@pytest.mark.parametrize("trained", [True, False])
def test_an_evaluation_is_its_plain_one(trained, run_and_plain_loop):
    out, model, _, _ = run_and_plain_loop
    line = f"{out} --device cpu --epochs 3 --k 7"
    if not trained:
        line += " --random-init"
        model = untrained_model()
    found = evaluation.evaluate(out, evaluation.parse_args(shlex.split(line)))
    for name, value in plain_evaluation(model).items():
        in_percent = name.endswith(("top1", "top5"))  # of 2000 images
        tolerance = 0.2 if in_percent else 1e-4
        assert found[name] == pytest.approx(float(value), rel=1e-3, abs=tolerance), name
    assert found["steps"] == (8 if trained else 0)
    assert found["k"] == 7
    assert found["features"] == 256
    assert found["embeddings"] == 16


def test_linear_probe_is_softmax_regression():
    torch.manual_seed(0)
    x, test_x = 5 + torch.randn(2, 900, 20)
    y, test_y = torch.randint(0, 8, (2, 900))
    x[range(900), y] += 1
    test_x[range(900), test_y] += 1
    mean, std = x.mean(0), x.std(0)

    def with_bias(z):
        return F.pad((z - mean) / std, (0, 1), value=1)

    weights = torch.zeros(21, 8, requires_grad=True)
    optimizer = torch.optim.AdamW([weights], weight_decay=1e-4)
    for epoch in range(12):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 + math.cos(math.pi * epoch / 12)) / 2
        optimizer.zero_grad()
        F.cross_entropy(with_bias(x) @ weights, y).backward()
        optimizer.step()
    ranking = (with_bias(test_x + 1) @ weights).argsort(1, descending=True)
    hits = ranking == test_y[:, None]
    expected = [100 * hits[:, :k].any(1).double().mean().item() for k in (1, 5)]
    found = evaluation.linear_probe(x, y, test_x + 1, test_y, 8, epochs=12)
    assert found == pytest.approx(expected, abs=0.3)


# --- From training to evaluation -----------------------------------------------------------------


def assert_evaluates(out):
    for flag in ("", "--random-init", "--patches"):
        name = f"eval{flag[1:]}.json"
        output = run_to_the_end(f"eval.py '{out}' --epochs 5 {flag}")
        assert "Traceback" not in output, output
        result = json.loads((out / name).read_text())
        for key in ("linear_top1", "linear_top5", "knn_top1"):
            assert 0 < result[key] <= 100, result
        assert result["linear_top1"] <= result["linear_top5"]
        assert result["rankme"] >= 1


@pytest.mark.parametrize("device", ["cpu", *(f"{kind} --precision auto" for kind in ACCELERATORS)])
def test_train_and_evaluate_shapes_from_the_command_line(device, tmp_path):
    out = tmp_path / "a run"
    line = f"{HERE}/train.py --dataset shapes --epochs 1 --batch-size 500 {TINY}"
    result = run_command(f"{line} --out '{out}' --device {device}")
    assert result.returncode == 0, result.stderr
    assert f"eval.py {out}" in result.stderr, result.stderr
    assert_evaluates(out)


def test_a_resnets_defaults_lower_the_loss_from_the_start(tmp_path):
    run_to_the_end(
        "train.py --dataset shapes --arch resnet18 --image-size 8 --epochs 1 --device cpu"
        f" --precision fp32 --out '{tmp_path}'"
    )
    statuses = [record for record in log_records(tmp_path) if "seconds" in record]
    assert all({"step", "epoch", "samples_per_s", "lr"} <= set(status) for status in statuses)
    assert [status["step"] for status in statuses][-1] == len(losses(tmp_path)) - 1
    assert {"probe_test", "rankme", "L_c"} <= set(statuses[-1])
    first, *later = losses(tmp_path)
    assert max(later) < first, later
    assert statistics.mean(later[-4:]) < first - 1.5, later


def write_run(out, tests, seconds):
    """A folder like that of a run with these test accuracies after epochs of these lengths."""
    out.mkdir()
    saved = {"settings": vars(parse_train("")), "step": 1, "log_bytes": 0, "states": {}}
    torch.save(saved, out / "checkpoint.pt")
    records = [{"step": 0, "loss": 1.0}]
    records += [{"seconds": s, "samples_per_s": 600 / s} for s in seconds]
    for record, test in zip(records[1:], tests):
        record["probe_test"] = test
    (out / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_plot(tmp_path, monkeypatch, refused):
    runs = [tmp_path / name for name in ("long", "paused", "young")]
    write_run(runs[0], [10.0, 30.0, 50.0], [30, 30, 30])
    write_run(runs[1], [20.0, 50.0, 60.0], [60, 3000, 60])
    write_run(runs[2], [], [30])
    (runs[0] / "eval.json").write_text('{"linear_top1": 54.0}')
    (runs[0] / "eval-patches.json").write_text('{"linear_top1": 69.0}')
    drawn = []
    draw = matplotlib.axes.Axes.plot

    def record_and_draw(*args, **kwargs):
        drawn.append((args, kwargs))
        return draw(*args, **kwargs)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", record_and_draw)
    baseline = mock.Mock()
    monkeypatch.setattr(matplotlib.axes.Axes, "axhline", baseline)
    evaluation.plot(runs, tmp_path / "picture.png")
    curves = {options["label"]: curve for curve, options in drawn if "label" in options}
    expected = {
        "long": ([0.5, 1.0, 1.5], [10, 30, 50]),
        "paused": ([1.0, 2.0, 3.0], [20, 50, 60]),
        "young": ([], []),
    }
    assert list(curves) == list(expected)
    assert [star[1:3] for star, options in drawn if "label" not in options] == [(1.5, 54)]
    for (_, minutes, tests, *_), curve in zip(curves.values(), expected.values()):
        assert (minutes.tolist(), tests.tolist()) == curve
    assert baseline.call_args.args == (69.0,)
    assert Image.open(tmp_path / "picture.png").size == (900, 600)
    run = shlex.quote(str(runs[0]))
    refused(f"eval.py {run} --plot {run}/picture.what", "--plot", "picture.what", "not supported")
    refused(f"eval.py {run} --plot {run}/none/picture.png", "none/picture.png", "No such file")
    log = (runs[0] / "log.jsonl").read_text()
    for name, content in (("log.jsonl", ""), ("log.jsonl", log[:-9]), ("eval.json", "")):
        kept = (runs[0] / name).read_text()
        (runs[0] / name).write_text(content)
        refused(f"eval.py {run} --plot {run}/picture.png", str(runs[0]), "empty or damaged")
        (runs[0] / name).write_text(kept)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    with pytest.raises(SystemExit, match="2"):
        evaluation.plot(runs[:1], tmp_path / "other.png")


def test_train_and_evaluate_a_resnet_on_files(train_command, tmp_path):
    run_to_the_end(train_command(tmp_path, 1, "--arch resnet18 --projector 16-8"))
    readme = (HERE / "README.md").read_text()
    code = re.search(r"<!-- encoder -->\n```python\n(.*?)```", readme, re.S).group(1)
    namespace = dict(torch=torch, torchvision=torchvision, nn=torch.nn)
    exec(code.replace("runs/resnet18", str(tmp_path)), namespace)
    assert namespace["model"](torch.zeros(1, 3, 32, 32)).shape == (1, 512)
    saved = load_checkpoint(tmp_path)
    saved["settings"]["precision"] = "fp16"  # a GPU's run, evaluated without one
    torch.save(saved, tmp_path / "checkpoint.pt")
    assert_evaluates(tmp_path)


# --- ImageNet's size -----------------------------------------------------------------------------
IMAGENET_SIZED = """
import torch
from duality import diagnose
from eval import knn, linear_probe
train_x, train_y = torch.empty(1_281_167, 2048), torch.randint(0, 1000, (1_281_167,))
for part in train_x.split(10_000):
    part.normal_()
test_x, test_y = torch.randn(50_000, 2048), torch.randint(0, 1000, (50_000,))
linear_probe(train_x, train_y, test_x, test_y, 1000, epochs=1)
knn(train_x, train_y, test_x[:200], test_y[:200], 1000)
print(diagnose(test_x)["negative_variance"].item() * 2048)
"""


@pytest.mark.skipif(not os.environ.get("DUALITY_LONG"), reason="takes ten minutes and 14 GB")
def test_evaluation_of_imagenets_size_fits_in_24_gigabytes():
    import resource  # Windows has none

    command = [sys.executable, "-c", IMAGENET_SIZED]
    result = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(1, abs=0.01)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"{peak / 1e9:.1f} GB at most")
    assert peak < 24e9


if __name__ == "__main__" and sys.argv[1:2] == ["--worker"]:
    run_worker(*sys.argv[2:])
