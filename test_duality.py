"""Tests: `pytest test_duality.py`. What the criteria cost: `python test_duality.py --benchmark`.

PLAIN computes each criterion straight from its formula. PUBLISHED is code that people use. The
tests are in the order of the paper and of train.py.
"""

import argparse
import contextlib
import copy
import inspect
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import matplotlib.axes
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

import duality
import eval as evaluation
import train
from duality import CRITERIA

# --- Plain references: each criterion's terms, from its formula ----------------------------------


def unit(z):
    return z / z.norm(dim=1, keepdim=True)


def centered(z):
    return z - z.mean(0)


def standardized(z):
    return centered(z) / (centered(z).square().mean(0) + 1e-5).sqrt()


def dimensions_normalized(z):
    """Centered dimensions scaled to norm sqrt(N / D)."""
    n, d = z.shape
    return unit(centered(z).T).T * (n / d) ** 0.5


def off_diagonal(matrix):
    """The entries off the diagonal, (n, n - 1)."""
    n = len(matrix)
    return matrix[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)


def plain_vicreg(za, zb, invariance=25, variance=25, covariance=1, temperature=0, transpose=False):
    v = c = 0
    for z in (za, zb):
        k = centered(z) if transpose else centered(z).T
        n, m = k.shape
        covariances = k @ k.T / (m - 1)
        v = v + F.relu(1 - (covariances.diagonal() + 1e-4).sqrt()).sum() / n
        others = off_diagonal(covariances)
        summands = (others / temperature).exp().sum(1).log() if temperature else others.square()
        c = c + summands.sum() / n
    s = (za - zb).square().sum() / za.numel()
    return dict(invariance=invariance * s, variance=variance / 2 * v, covariance=covariance * c)


def plain_nt_xent(za, zb, temperature=0.2, negatives="both", s=torch.clone, scale=unit, dcl=False):
    za, zb = scale(za), scale(zb)
    invariance = repulsion = 0
    for x, y in ((za, zb), (zb, za)):
        positives = s((x * y).sum(1)) / temperature
        candidates = [x, y] if negatives == "both" else [x]
        exponentials = [(s(off_diagonal(x @ other.T)) / temperature).exp() for other in candidates]
        denominators = sum(each.sum(1) for each in exponentials)
        if not dcl:
            denominators = denominators + positives.exp()
        invariance = invariance - positives.mean() / 2
        repulsion = repulsion + denominators.log().mean() / 2
    return dict(invariance=invariance, repulsion=repulsion)


def plain_spectral(za, zb, radius=3.0):
    za, zb = (torch.stack([x * min(radius / x.norm(), 1) for x in z]) for z in (za, zb))
    invariance = -2 * (za * zb).sum() / len(za)
    return dict(invariance=invariance, repulsion=off_diagonal(za @ zb.T).square().mean())


def plain_barlow_twins(za, zb, redundancy=0.0051, scale=1.0):
    c = standardized(za).T @ standardized(zb) / len(za)
    invariance = scale * (1 - c.diagonal()).square().sum()
    redundancy = scale * redundancy * off_diagonal(c).square().sum()
    return dict(invariance=invariance, redundancy=redundancy)


def plain_tcr(za, zb, invariance=1.0, eps=0.5):
    za, zb = unit(za), unit(zb)
    n, d = za.shape
    rates = [torch.logdet(torch.eye(d) + d / (n * eps**2) * z.T @ z) / 2 for z in (za, zb)]
    distance = (za - zb).square().sum() / n
    return dict(invariance=invariance * distance, repulsion=-sum(rates) / (2 * n))


def plain_squared_contrast(za, zb, invariance=25.0, repulsion=1.0, transpose=False):
    za, zb = dimensions_normalized(za), dimensions_normalized(zb)
    n = len(za)
    ks = (za.T, zb.T) if transpose else (za, zb)
    squares = sum(off_diagonal(k @ k.T).square().sum() for k in ks)
    distance = (za - zb).square().sum() / n
    return dict(invariance=invariance * distance, repulsion=repulsion * squares / (2 * n))


CHAIN = ["vicreg", "vicreg-exp", "vicreg-ctr", "simclr"]


def plain_chain(za, zb, t=1.5):
    k = int(t)
    terms = {}
    for name, weight in ((CHAIN[k], 1 - (t - k)), (CHAIN[k + 1], t - k)):
        for key, term in PLAIN[name](za, zb).items():
            terms[f"{name} {key}"] = weight * term
    return terms


PLAIN = {
    "vicreg": plain_vicreg,
    "vicreg-contrastive": plain_vicreg,
    "vicreg-exp": partial(plain_vicreg, covariance=25.0, temperature=0.1),
    "vicreg-ctr": partial(plain_vicreg, covariance=25.0, temperature=0.2, transpose=True),
    "simclr-centered": partial(plain_nt_xent, scale=lambda z: unit(centered(z))),
    "simclr-standardized": partial(plain_nt_xent, scale=dimensions_normalized),
    "spectral": plain_spectral,
    "barlow-twins": plain_barlow_twins,
    "tcr": plain_tcr,
    "sample-contrastive": plain_squared_contrast,
    "dimension-contrastive": partial(plain_squared_contrast, transpose=True),
    "chain": plain_chain,
}
for variant, similarity in (("", torch.clone), ("-sq", torch.square), ("-abs", torch.abs)):
    PLAIN["simclr" + variant] = partial(plain_nt_xent, s=similarity)
    PLAIN["dcl" + variant] = partial(plain_nt_xent, s=similarity, dcl=True)

# --- Published code ------------------------------------------------------------------------------


def official_vicreg(za, zb):
    """facebookresearch/vicreg, restated."""
    loss = 25.0 * F.mse_loss(za, zb)
    for z in (za, zb):
        z = z - z.mean(0)
        n, d = z.shape
        c = z.T @ z / (n - 1)
        loss = loss + 25.0 * F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() / 2
        loss = loss + c.flatten()[:-1].view(d - 1, d + 1)[:, 1:].pow(2).sum() / d
    return loss


PUBLISHED = {("vicreg", "official"): official_vicreg}  # at duality.py's default hyperparameters
with contextlib.suppress(ImportError):  # without lightly, its losses are neither tested nor timed
    from lightly import loss as lightly

    PUBLISHED["vicreg", "lightly"] = lightly.VICRegLoss()
    PUBLISHED["barlow-twins", "lightly"] = lightly.BarlowTwinsLoss(lambda_param=0.0051)
    PUBLISHED["simclr", "lightly"] = lightly.NTXentLoss(temperature=0.2)
    PUBLISHED["dcl", "lightly"] = lightly.DCLLoss(temperature=0.2)

# --- The benchmark -------------------------------------------------------------------------------


def two_views(n, d, seed=0, noise=0.5, dtype=torch.float64):
    """Random embeddings of n samples, and the same with noise added."""
    generator = torch.Generator().manual_seed(seed)
    za, zb = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    return za.to(dtype), (za + noise * zb).to(dtype)


def value_and_gradients(function, *zs, **hyperparameters):
    zs = [z.detach().requires_grad_() for z in zs]
    value = function(*zs, **hyperparameters)
    return value.detach(), *torch.autograd.grad(value, zs)


def summed(terms):
    """The loss of a function that returns a dict of terms."""
    return lambda *zs, **hyperparameters: sum(terms(*zs, **hyperparameters).values())


def median_ms(runs, seconds=0.3):
    """The median time of each run. They take turns, so that the machine's load hits all alike."""
    times = [[] for _ in runs]
    while sum(map(sum, times)) < seconds * len(runs) and len(times[0]) < 50:
        for run, own_times in zip(runs, times):
            for _ in range(2):  # the first fills the caches, which hold another run's data
                start = time.perf_counter()
                run()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
            own_times.append(time.perf_counter() - start)
    return [1e3 * statistics.median(own_times) for own_times in times]


def peak_mib(run, device="cpu"):
    """The most memory that the tensors of a run take at a time."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    os.environ["KINETO_LOG_LEVEL"] = "99"  # or the profiler announces itself
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(size for _, size in sorted(changes))) / 2**20


def bare_products(name, za, zb):
    """The matrix products that cannot be avoided: one forward, the products with it backward."""
    if name in ("simclr", "dcl"):
        z = torch.cat((za, zb))
        return z @ z.T @ z
    n, d = za.shape
    a, b = (za, zb) if n < d else (za.T, zb.T)
    if name == "barlow-twins" and n >= d:
        c = a @ b.T
        return c @ b, c.T @ a
    return a @ a.T @ a, b @ b.T @ b


def benchmark(name, n, d, device, compile):
    zs = [z.to(device) for z in two_views(n, d, dtype=torch.float32)]
    losses = {"ours": CRITERIA[name]}
    if compile:
        torch.compiler.reset()  # all criteria share a wrapper, which is compiled 8 times at most
        losses["ours"] = summed(torch.compile(CRITERIA[name].terms, dynamic=False))
    losses.update({peer: loss for (other, peer), loss in PUBLISHED.items() if other == name})
    runs = [partial(value_and_gradients, loss, *zs) for loss in losses.values()]
    bare_ms, *times = median_ms([partial(bare_products, name, *zs), *runs])
    mibs = [peak_mib(run, device) for run in runs]
    ms, mib = times[0], mibs[0]
    row = f"{name:12} {n:5} {d:5} {ms:8.2f} {bare_ms:8.2f} {ms / bare_ms:6.2f} {mib:7.1f}"
    for peer, peer_ms, peer_mib in zip(list(losses)[1:], times[1:], mibs[1:]):
        row += f" | {peer:8} x {peer_ms / ms:6.2f}, x {peer_mib / mib:5.2f}"
    print(row, flush=True)


def print_speeds(what, n, seconds, **runs):
    """Prints images per second of each run, of n images, and how many times the first one's."""
    speeds = [1e3 * n / ms for ms in median_ms(runs.values(), seconds)]
    texts = [f"{name} {v:.0f} (x {v / speeds[0]:.1f})" for name, v in zip(runs, speeds)]
    print(f"{what}, one core, images/s: {', '.join(texts)}")


def published_view(crop, *more):
    """torchvision's transforms of a PIL image, as in VICReg's code."""
    jitter = transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)
    operations = [crop, transforms.RandomHorizontalFlip(), transforms.RandomApply([jitter], 0.8)]
    operations += [transforms.RandomGrayscale(0.2), *more, transforms.ToTensor()]
    return transforms.Compose([*operations, transforms.Normalize(train.MEAN, train.STD)])


def benchmark_views():
    torch.set_num_threads(1)
    torch.zeros(2**22)  # having freed so much, malloc keeps what is freed, as it does in training
    images, numbers = train.shapes(256, 0)[0], torch.rand(256, train.NUMBERS)
    pil_images = [TF.to_pil_image(image) for image in images]
    view = published_view(transforms.RandomResizedCrop(32, (0.2, 1)))
    runs = dict(PIL=lambda: torch.stack([view(image) for image in pil_images]))
    compiled = torch.compile(train.augment, dynamic=False)
    for name, augment in (("augment", train.augment), ("compiled", compiled)):
        runs[name] = partial(augment, images, numbers, train.AUGMENTATION, 32)
        runs[name]()  # compiles
    print_speeds("\n32-pixel views", 256, 0.3, **runs)


def save_images(root, images, classes=("a b", "я"), splits=("train", "test"), kind="png"):
    """Saves image i in class i mod 2, or how many there are, for training and for testing."""
    for i, image in enumerate(images):
        for split in splits:
            file = Path(root, split, classes[i % len(classes)], f"{i:02} ä.{kind}")
            file.parent.mkdir(parents=True, exist_ok=True)
            TF.to_pil_image(image).save(file, quality=90)


def benchmark_readers():
    """Of one worker, from JPEG files of 500 x 375 to both views' crops."""
    blur = transforms.Lambda(lambda x: x.filter(ImageFilter.GaussianBlur(2 * random.random())))
    crop = transforms.RandomResizedCrop(224, interpolation=transforms.InterpolationMode.BICUBIC)
    rare_blur, solarize = transforms.RandomApply([blur], 0.1), transforms.RandomSolarize(128, 0.2)
    views = published_view(crop, blur), published_view(crop, rare_blur, solarize)
    images = train.shapes(32, 0, 500)[0][:, :, :375].float()
    images = (images + 12 * torch.randn_like(images)).clamp(0, 255).byte()
    train.HELD_BYTES = 0
    with tempfile.TemporaryDirectory() as folder:
        save_images(folder, images, "a", kind="jpg")
        args = train.parse_args(["--dataset=imagenet", f"--data-dir={folder}", "--batch-size=32"])
        data = train.load(args)[0]
        data.transform = None

        def pil():
            return [[view(image) for view in views] for image, _ in data]

        what = "two 224-pixel views of 500 x 375 JPEGs"
        print_speeds(what, 32, 3, PIL=pil, workers=partial(train.step_data, data, args, 0))


def run_benchmark():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--benchmark", action="store_true", required=True)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compile", action="store_true", help="the criteria of duality.py")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    where = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
    print(f"Loss and gradient in float32, torch {torch.__version__}, {where}.")
    print("duality.py: ms, bare products' ms, ratio, MiB | published code: ms, MiB over these\n")
    print(f"{'criterion':12} {'N':>5} {'D':>5} {'ms':>8} {'bare ms':>8} {'ratio':>6} {'MiB':>7}")
    for name in ("vicreg", "barlow-twins", "simclr", "dcl"):
        exponents = range(7, 14) if name == "vicreg" else (7, 9, 11, 13)  # vicreg's are drawn
        for n, d in [*((256, 2**k) for k in exponents), (1024, 512), (1024, 2048), (1024, 8192)]:
            benchmark(name, n, d, args.device, args.compile)
    benchmark_views()
    benchmark_readers()


if __name__ == "__main__":
    run_benchmark()

# --- The tests -----------------------------------------------------------------------------------

torch.set_num_threads(1)  # on a busy machine threads wait for each other at each operation

SHAPES = [(8, 5), (5, 12), (6, 6)]
OTHERS = dict(invariance=3.0, variance=2.0, covariance=0.7, repulsion=0.3, redundancy=0.1)
OTHERS |= dict(temperature=0.07, negatives="own", radius=1.5, eps=0.3, t=0.3, scale=0.1)
every_criterion = pytest.mark.parametrize("name", CRITERIA)
every_shape = pytest.mark.parametrize("n, d", SHAPES)


@pytest.fixture(params=[duality.BLOCK, 60], ids=["whole", "in blocks"])
def block(request, monkeypatch):
    """Runs a test with every log-sum-exp whole, and again with most of them in blocks."""
    monkeypatch.setattr(duality, "BLOCK", request.param)


def assert_equal(found, exact, tolerance=1e-10):
    assert len(found) == len(exact)
    for x, y in zip(found, exact):
        assert x.shape == y.shape
        assert (x - y).norm() <= tolerance * y.norm(), (x, y)


def accepted_by(name, values):
    accepted = inspect.signature(CRITERIA[name]).parameters
    return {key: value for key, value in values.items() if key in accepted}


def rotation(n):
    return torch.linalg.qr(two_views(n, n)[1]).Q


# --- Section 3: the theorem, its bounds, its algorithm ---


@pytest.mark.parametrize("n, d", [(2, 2), (40, 3), (3, 40), *SHAPES])
def test_theorem_3_3(n, d):
    z = two_views(n, d)[0]
    l_c, l_nc = (off_diagonal(k @ k.T).square().sum() for k in (z, z.T))
    embeddings, dimensions = (sum(x.norm() ** 4 for x in k) for k in (z, z.T))
    found = duality.L_c(z), duality.L_nc(z), duality.norms4(z), duality.norms4(z.T)
    assert_equal(found, (l_c, l_nc, embeddings, dimensions))
    assert_equal([l_nc + dimensions], [l_c + embeddings])
    for function in (duality.L_c, duality.L_nc, duality.norms4):
        under_autocast = torch.autocast("cpu", torch.bfloat16)(function)
        assert under_autocast(z.float()) == function(z.float())


@given(st.integers(2, 40), st.integers(2, 40), st.floats(0.1, 10))
@settings(deadline=None, derandomize=True, max_examples=30)
def test_lemma_3_4_and_corollary_3_4_1(n, d, a):
    x = unit(two_views(n, d)[0].exp())  # n embeddings of norm 1; for the dual, n dimensions
    low, high = duality.lemma_3_4(n, d, a)
    assert low - 1e-6 <= duality.norms4(a * x.T) <= high + 1e-6
    # equal entries reach the lower bound, a single dimension that is not 0 the upper one
    assert duality.norms4(torch.full((d, n), a / d**0.5)).item() == pytest.approx(low)
    assert duality.norms4(torch.full((1, n), a)).item() == pytest.approx(high)
    low, high = duality.corollary_3_4_1(x)
    for z, criterion, dual in ((x, duality.L_c, duality.L_nc), (x.T, duality.L_nc, duality.L_c)):
        assert low - 1e-6 <= criterion(z) <= high + 1e-6
        assert_equal((low, high), (dual(z) - n + n**2 / d, dual(z) - n + n**2))


def test_module_shows_the_theorem(capsys):
    runpy.run_path(duality.__file__, run_name="__main__")
    left, right = (line.split(" = ")[-1] for line in capsys.readouterr().out.splitlines())
    assert left == right


def operations(function, *args):
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


WIDE = [(name, 8, 16) for name in ("vicreg", "barlow-twins", "simclr", "dcl")]
# for 2N > D, simclr and dcl make a second product backward: it costs less than G + G^T


@pytest.mark.parametrize("name, n, d", [*WIDE, ("vicreg", 16, 8), ("barlow-twins", 16, 8)])
def test_no_matrix_product_that_can_be_avoided(name, n, d):
    zs = two_views(n, d)
    found = operations(value_and_gradients, CRITERIA[name], *zs)
    assert found == operations(bare_products, name, *zs)


# --- Every criterion: its formula, derivatives and symmetries, whatever is put in ---


@pytest.mark.usefixtures("block")
@every_shape
@pytest.mark.parametrize("others", [{}, OTHERS], ids=["defaults", "others"])
@every_criterion
def test_terms_are_the_plain_ones_and_the_loss_is_their_sum(name, others, n, d):
    criterion, zs, hyperparameters = CRITERIA[name], two_views(n, d), accepted_by(name, others)
    found, exact = (f(*zs, **hyperparameters) for f in (criterion.terms, PLAIN[name]))
    assert list(found) == list(exact)
    assert_equal(found.values(), exact.values())
    exact = value_and_gradients(summed(PLAIN[name]), *zs, **hyperparameters)
    assert_equal(value_and_gradients(criterion, *zs, **hyperparameters), exact)
    assert criterion is getattr(duality, name.replace("-", "_"))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 5e-6)])
@pytest.mark.parametrize("n, d", [(32, 80), (64, 24)])
@pytest.mark.parametrize("name, author", PUBLISHED)
def test_published_code_agrees(name, author, n, d, dtype, tolerance):
    zs = two_views(n, d, dtype=dtype)
    found, exact = (value_and_gradients(f, *zs) for f in (CRITERIA[name], PUBLISHED[name, author]))
    assert_equal(found, exact, tolerance)


def test_chain_links_the_criteria():
    zs = two_views(8, 5)
    links = [CRITERIA[name](*zs) for name in CHAIN]
    assert_equal([duality.chain(*zs, t=t) for t in range(4)], links)


def test_blocks_bound_the_memory(monkeypatch):
    monkeypatch.setattr(duality, "BLOCK", 2**14)
    zs = two_views(512, 8)  # whole, it takes 33 MiB
    assert peak_mib(partial(value_and_gradients, duality.simclr, *zs)) < 2


BAD = [("simclr", "negatives", "all"), ("dcl", "temperature", 0.0), ("chain", "t", 3.01)]


@pytest.mark.parametrize("name, key, bad", [*BAD, ("vicreg-exp", "temperature", -1.0)])
def test_bad_hyperparameters_are_refused(name, key, bad):
    with pytest.raises(ValueError, match=f"{key}.*{bad}"):
        CRITERIA[name](*two_views(4, 3), **{key: bad})


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("n, d", [(6, 3), (3, 6)])
@every_criterion
def test_first_and_second_derivatives(name, n, d):
    zs = [z.requires_grad_() for z in two_views(n, d)]
    assert torch.autograd.gradcheck(CRITERIA[name], zs)
    assert torch.autograd.gradgradcheck(CRITERIA[name], zs, fast_mode=True)


def reflect_samples(zs):
    """K Q for a reflection Q with Q 1 = 1, which leaves the samples' mean where it is."""
    v = centered(two_views(zs.shape[1], 1)[0])
    return zs - 2 * v @ (v.T @ zs) / v.square().sum()


COSINE = {"simclr", "simclr-sq", "simclr-abs", "simclr-centered", "dcl", "dcl-sq", "dcl-abs"}
COVARIANCE = {"vicreg", "vicreg-contrastive", "vicreg-exp", "barlow-twins", "dimension-contrastive"}
CENTERED = {"vicreg-ctr", "simclr-centered", "simclr-standardized", "sample-contrastive", "chain"}
LAWS = {  # a change of both views (2, N, D); the criteria that it leaves as they are, and no others
    "order of views": (lambda zs: zs.flip(0), set(CRITERIA)),
    "order of samples": (lambda zs: zs.roll(2, 1).flip(1), set(CRITERIA)),
    "order of dimensions": (lambda zs: zs.roll(2, 2).flip(2), set(CRITERIA)),
    "rotation": (lambda zs: zs @ rotation(9), COSINE | {"spectral", "tcr", "vicreg-ctr"}),
    "reflection of samples": (reflect_samples, COVARIANCE),
    "translation": (lambda zs: zs + torch.arange(9), COVARIANCE | CENTERED),
    "lengths": (lambda zs: zs * torch.arange(1, 7)[:, None], COSINE - CENTERED | {"tcr"}),
}


@every_criterion
@pytest.mark.parametrize("law", LAWS)
def test_laws_of_invariance(name, law):
    change, invariant = LAWS[law]
    zs = torch.stack(two_views(6, 9))
    before, after = CRITERIA[name](*zs), CRITERIA[name](*change(zs))
    same = abs(before - after) < 1e-9 * (1 + abs(before))
    assert same == (name in invariant), (before, after)


def nearly_orthogonal(za, zb):
    """Views whose dimensions (N >= D) or embeddings (N < D) are nearly orthogonal."""
    n, d = za.shape
    q = torch.linalg.qr(centered(za)).Q if n >= d else torch.linalg.qr(za.T).Q.T
    return [max(n, d) ** 0.5 * q + 0.02 * z for z in (za, zb)]


SIZES = [(n, d, True) for n, d in ((64, 24), (100, 101), (256, 1024), (1024, 256))]
SIZES += [(64, 24, False), (512, 1024, False)]


@pytest.mark.parametrize("n, d, near_optimum", SIZES)
def test_float32_is_precise(n, d, near_optimum):
    names, zs = set(CRITERIA), two_views(n, d)
    if near_optimum:
        zs = nearly_orthogonal(*two_views(n, d, noise=0.05))
        # all terms of barlow-twins vanish; vicreg-contrastive subtracts almost equal sums
        names -= {"barlow-twins", "vicreg-contrastive"} if n > d else {"barlow-twins"}
    zs = [z.float() for z in zs]
    for name in names:
        exact = CRITERIA[name].terms(*(z.double() for z in zs)).values()
        error = CRITERIA[name](*zs) - sum(exact)
        assert abs(error) < 2e-6 * sum(map(abs, exact)), name
    assert not duality.normalize_dimensions(torch.linspace(0, 20, d).expand(n, d)).any()


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_criterion
def test_half_precision_and_autocast_compute_in_float32(name, dtype):
    zs = two_views(16, 40, dtype=dtype)
    wide = [z.float() for z in zs]
    value, *gradients = value_and_gradients(CRITERIA[name], *wide)
    assert value.dtype == torch.float32
    narrow = [gradient.to(dtype) for gradient in gradients]
    for function in (CRITERIA[name], torch.autocast("cpu", torch.bfloat16)(CRITERIA[name])):
        assert_equal(value_and_gradients(function, *wide), (value, *gradients), 0)
        assert_equal(value_and_gradients(function, *zs), (value, *narrow), 0)


DEGENERATE = {
    "all equal": lambda z: z[:1].expand_as(z),
    "all zero": torch.zeros_like,
    "one zero": lambda z: z * (torch.arange(len(z)) > 0)[:, None],
    "on one line": lambda z: z[:, :1] * z[:1],
    "a dead dimension": lambda z: z * (torch.arange(z.shape[1]) > 0),
    "equal in pairs": lambda z: z[torch.arange(len(z)) // 2],
}


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("kind", DEGENERATE)
@every_criterion
def test_collapse_leaves_loss_and_gradients_finite(name, kind):
    za, zb = map(DEGENERATE[kind], two_views(6, 9, dtype=torch.float32))
    for zs in ((za, zb), (za, za), (za.double(), zb.double())):
        for hyperparameters in ({}, accepted_by(name, {"temperature": 0.01})):
            found = value_and_gradients(CRITERIA[name], *zs, **hyperparameters)
            assert all(x.isfinite().all() for x in found)


powers = st.integers(-14, 14)


@given(st.integers(2, 9), st.integers(1, 12), powers, powers, st.sampled_from([None, *DEGENERATE]))
@settings(deadline=None, derandomize=True, max_examples=30)
@every_criterion
def test_finite_or_refused(name, n, d, a, b, kind):
    za, zb = map(DEGENERATE.get(kind, torch.clone), two_views(n, d, dtype=torch.float32))
    za, zb = za * 10.0**a, zb * 10.0**b
    try:
        value, *gradients = value_and_gradients(CRITERIA[name], za, zb)
    except ValueError:
        assert max(a, b) > 8 or d == 1
    else:
        terms = CRITERIA[name].terms(za.double(), zb.double()).values()
        near = abs(value - sum(terms)) <= 1e-4 * (1 + sum(map(abs, terms)))
        assert near or kind  # collapsed embeddings, normalized, may be rounding noise
        assert all(gradient.isfinite().all() for gradient in gradients)


@every_criterion
def test_bad_views_are_refused(name):
    good, worse = two_views(4, 5)
    for bad in (math.nan, math.inf, -math.inf):
        worse[1, 2] = bad
        for zs in ((good, worse), (worse, good)):
            with pytest.raises(ValueError, match=name.replace("-", "_")):
                CRITERIA[name](*zs)
    shapes = [2 * [shape] for shape in ((4,), (2, 3, 4), (1, 5), (4, 0))]
    for a, b in [*shapes, [(4, 6), (4, 5)], [(5, 5), (4, 5)]]:
        for function in (CRITERIA[name], CRITERIA[name].terms):
            with pytest.raises(ValueError) as error:
                function(torch.randn(a), torch.randn(b))
            assert str(error.value).endswith(f"{torch.Size(a)}, {torch.Size(b)}")
    with pytest.raises(TypeError, match="positional"):  # hyperparameters are keywords
        CRITERIA[name](good, good, 1.0)


@every_criterion
def test_terms_compile_whole_and_torch_func_takes_the_loss(name):
    torch.compiler.reset()
    terms = torch.compile(CRITERIA[name].terms, backend="aot_eager", fullgraph=True)
    zs, exact = two_views(8, 5), value_and_gradients(CRITERIA[name], *two_views(8, 5))
    assert_equal(value_and_gradients(summed(terms), *zs), exact)
    assert_equal(torch.func.grad(CRITERIA[name], (0, 1))(*zs), exact[1:])


# --- To watch ---


@pytest.mark.parametrize("spectrum", [[1] * 7, [1] + [0] * 6, [4, 2, 1, 1, 0.5, 0.25, 0]])
@pytest.mark.parametrize("n, d", [(7, 7), (7, 20), (20, 7)])
def test_rankme_is_the_entropy_of_the_singular_values(spectrum, n, d):
    z = rotation(n)[:, :7] * torch.tensor(spectrum) @ rotation(d)[:7]
    shares = [s / sum(spectrum) for s in spectrum if s]
    entropy = -sum(p * math.log(p) for p in shares)
    assert duality.rankme(z).item() == pytest.approx(math.exp(entropy), rel=1e-4)
    assert operations(duality.rankme, z) == 2 * max(n, d) * min(n, d) ** 2  # the smaller matrix


@every_shape
def test_diagnose(n, d):
    z = (two_views(n, d)[0] + 0.5).float()
    found = duality.diagnose(z)
    assert all(value.dtype == torch.float64 and value.ndim == 0 for value in found.values())
    z = z.double()
    std, norm, cosines = z.std(0), z.norm(dim=1), off_diagonal(unit(z) @ unit(z).T)
    exact = dict(std_mean=std.mean(), std_min=std.min(), rankme=duality.rankme(z))
    exact |= dict(L_c=duality.L_c(z), L_nc=duality.L_nc(z))
    exact |= dict(norm_mean=norm.mean(), norm_std=norm.std())
    exact |= dict.fromkeys(("theorem_left", "theorem_right"), (z @ z.T).square().sum())
    exact |= dict(negative_mean=cosines.mean(), negative_variance=cosines.var(correction=0))
    assert found.keys() == exact.keys()
    assert_equal([found[key] for key in exact], list(exact.values()))
    for bad in (math.nan, math.inf):
        z[1, 2] = bad
        assert all(value.isnan() or value == bad for value in duality.diagnose(z).values())


@pytest.mark.parametrize("kind", DEGENERATE)
def test_diagnose_shows_collapse(kind):
    found = duality.diagnose(DEGENERATE[kind](two_views(6, 9, dtype=torch.float16)[0]))
    assert all(value.isfinite() for value in found.values())
    if kind.startswith("all"):
        assert found["std_min"] < 1e-9
        assert found["rankme"] < 1.001


# --- Views ----------------------------------------------------------------------------------------

HERE = Path(train.__file__).parent
MEAN, STD = (torch.tensor(values)[:, None, None] for values in (train.MEAN, train.STD))


def pictures(n=4, height=32, width=32):
    """Random uint8 images; the first also has greys and pixels with two equal channels."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, height, width), generator=draw, dtype=torch.uint8)
    images[0, :, 0], images[0, 1:, 1], images[0, 2, 2] = 128, 40, images[0, 0, 2]
    return images


def assert_close(found, expected, atol=0.0, rtol=0.0):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def plain_box(numbers, least, height, width):
    """A crop's top, left, height and width, by uniform numbers: RandomResizedCrop's algorithm."""
    top, left, shares, aspects = numbers[0], numbers[1], numbers[2:12], numbers[12:22]
    for share, aspect in zip(shares, aspects):
        area = (least + (1 - least) * share) * height * width
        ratio = (4 / 3) ** (2 * aspect - 1)
        h, w = max(1, round((area / ratio) ** 0.5)), max(1, round((area * ratio) ** 0.5))
        if h <= height and w <= width:
            break
    else:
        h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w


def plain_view(image, numbers, recipe, size):
    """A view, by torchvision's functions of one image."""
    box = plain_box(numbers[:22], recipe["crop"], *image.shape[1:])
    flip, jitter, brightness, contrast, saturation, hue, grey, blur, sigma, solarize = numbers[22:]
    x = TF.resized_crop(image / 255, *box, [size, size], antialias=True)
    x = TF.hflip(x) if flip < recipe["flip"] else x
    if jitter < recipe["jitter"]:
        x = TF.adjust_brightness(x, 1 + recipe["brightness"] * (2 * brightness - 1))
        x = TF.adjust_contrast(x, 1 + recipe["contrast"] * (2 * contrast - 1))
        x = TF.adjust_saturation(x, 1 + recipe["saturation"] * (2 * saturation - 1))
        x = TF.adjust_hue(x, recipe["hue"] * (2 * hue - 1))
    x = TF.rgb_to_grayscale(x, 3) if grey < recipe["grey"] else x
    if blur < recipe["blur"]:
        x = TF.gaussian_blur(x, 2 * max(1, size // 20) + 1, 0.1 + 1.9 * sigma)
    return TF.solarize(x, 0.5) if solarize < recipe["solarize"] else x


RECIPES = {"nothing": {}, "crop": dict(crop=0.001)}
RECIPES["all"] = train.AUGMENTATION | dict(blur=0.5, solarize=0.3)
RECIPES |= {name: {name: 0.6} for name in ("flip", "grey", "blur", "solarize")}
strongest = dict(brightness=1.0, contrast=1.0, saturation=1.0, hue=0.5)
RECIPES |= {name: {"jitter": 0.6, name: most} for name, most in strongest.items()}


@pytest.mark.parametrize("pixels, size", [(32, 32), (48, 24), (20, 64)])
@pytest.mark.parametrize("name", RECIPES)
def test_views_are_torchvisions(name, pixels, size):
    recipe = dict.fromkeys(train.AUGMENTATION, 0) | dict(crop=1) | RECIPES[name]
    images = pictures(60, pixels, pixels)
    numbers = torch.rand(60, train.NUMBERS, generator=torch.Generator().manual_seed(0))
    found = train.augment(images, numbers, recipe, size) * STD + MEAN
    expected = [plain_view(*pair, recipe, size) for pair in zip(images, numbers.tolist())]
    assert_close(found, torch.stack(expected), 5e-6)


SIDES = [(320, 320), (375, 500), (400, 30), (30, 400)]  # in the last two, often no box fits


@pytest.mark.parametrize("height, width", SIDES)
@pytest.mark.parametrize("least", [0.08, 0.2])
def test_crops_are_distributed_as_torchvisions(least, height, width):
    n, image, get = 10_000, torch.empty(3, height, width), transforms.RandomResizedCrop.get_params
    torch.manual_seed(0)
    theirs = torch.tensor([get(image, (least, 1), (3 / 4, 4 / 3)) for _ in range(n)])
    numbers = torch.rand(n, train.NUMBERS, dtype=torch.float64)
    ours = train.crop_boxes(numbers, least, height, width)
    assert ours.tolist() == [[*plain_box(row, least, height, width)] for row in numbers.tolist()]
    if 30 in (height, width):  # where no box fits, theirs is in the middle, ours anywhere
        theirs, ours = theirs[:, 2:], ours[:, 2:]
    for pair in zip(theirs.T, ours.T):
        shares = [side.bincount(minlength=501).cumsum(0) / n for side in pair]
        assert (shares[0] - shares[1]).abs().max() < 0.03  # Kolmogorov-Smirnov


# --- Data -----------------------------------------------------------------------------------------


def parse(line):
    return train.parse_args(line.split())


def batches(line, first, end):
    args = parse(f"--dataset folder --arch small --image-size 64 --workers 0 {line}")
    before = dict(vars(data := train.load(args)[0]))
    found = list(itertools.islice(train.training_batches(data, args, first), end - first))
    assert vars(data) == before  # whoever evaluates on it, too, needs its transform
    return found


held_or_streamed = pytest.mark.parametrize("streamed", [False, True])


def test_shapes_are_labelled_images_that_pixels_do_not_tell():
    *sets, classes = train.load(parse("--dataset shapes"))
    (x, y), (test_x, test_y) = (data.tensors for data in sets)
    assert (x.shape, x.dtype, len(classes)) == ((5000, 3, 32, 32), torch.uint8, 8)
    assert (y.bincount().tolist(), test_y.bincount().tolist()) == (8 * [625], 8 * [250])
    not_drawn, _ = train.shapes(2000, 0)  # the test set has another seed
    assert len({image.numpy().tobytes() for image in (*x, *test_x, *not_drawn)}) == 9000
    x, test_x = (z.flatten(1) / 255 for z in (x, test_x))
    top1, _ = evaluation.linear_probe(x, y, test_x, test_y, 8, epochs=2, lr=1e-3)
    assert top1 < 30  # chance is 12.5


@held_or_streamed
def test_an_epoch_has_each_image_once_in_two_views_of_it(streamed, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "HELD_BYTES", 0 if streamed else 2**32)
    images = pictures(1, 80, 60).repeat(20, 1, 1, 1)
    images[:, 0] = 10 * torch.arange(20)[:, None, None]  # the red channel tells which it is
    save_images(tmp_path, images)
    line = f"--data-dir {tmp_path} --batch-size 6 --grow 0 --views flip=0 jitter=0 grey=0 --seed"
    seen = batches(f"{line} 0", 0, 9) + batches(f"{line} 1", 0, 9)  # three epochs of each seed
    views = torch.stack([views * STD + MEAN for views, _ in seen]).unflatten(1, (2, 6))
    red = (25.5 * views[:, :, :, 0]).round()  # (18 steps, two views, 6 images, 64, 64)
    which = red[:, 0, :, 0, 0]
    assert_close(red, which[:, None, :, None, None].expand_as(red))
    assert torch.equal(which % 2, torch.stack([labels for _, labels in seen]))
    assert (which.reshape(6, 18).sort().values.diff() > 0).all()
    assert len(which.reshape(6, 18).unique(dim=0)) == 6
    assert len(views[:, :, :, 1:].flatten(0, 2).unique(dim=0)) == 6 * 36  # no crop comes again


@held_or_streamed
@pytest.mark.parametrize("world, rank, workers", [(1, 0, 2), (2, 0, 0), (2, 1, 0)])
def test_views_and_test_images(streamed, world, rank, workers, tmp_path, monkeypatch):
    """Streamed views are cut out of whole images, for testing 7/8 of the shorter side."""
    workers_seen, loader = set(), train.DataLoader

    def look(data, num_workers, **options):
        workers_seen.add(num_workers)
        return loader(data, num_workers=num_workers, **options)

    replaced = dict(HELD_BYTES=0 if streamed else 2**32, WORLD=world, RANK=rank, DataLoader=look)
    for name, value in replaced.items():
        monkeypatch.setattr(train, name, value)
    images = pictures(8, 32, 48) if streamed else pictures(8, 28, 28)
    save_images(tmp_path, images, splits=("train", "val" if streamed else "test"))
    images = torch.cat((images[::2], images[1::2]))  # in the order of the classes' folders
    line = f"--data-dir {tmp_path} --image-size 28 --batch-size 4 --epochs 3 --grow 0.5"
    line += f" --workers {workers} --seed 1 --views jitter=0 crop=0.1,0.5 grey=0,1"
    (small_views, _), (views, labels) = batches(line, 2, 4)  # of two steps in an epoch
    own = torch.arange(4).chunk(world)[rank].tolist()
    order = torch.randperm(8, generator=train.generator(1, 1))[4:]
    numbers = torch.rand(2, 4, train.NUMBERS, generator=train.generator(1, 3, 0)).tolist()
    args, expected = parse(f"--dataset folder {line}"), []
    assert [(recipe["crop"], recipe["grey"]) for recipe in args.recipes] == [(0.1, 0), (0.5, 1)]
    for of_view, recipe in zip(numbers, args.recipes):
        expected += [plain_view(images[order[i]], of_view[i], recipe, 28) for i in own]
    assert_close(views * STD + MEAN, torch.stack(expected), 1 / 255 if streamed else 5e-6)
    assert (small_views.shape[-1], labels.tolist()) == (17, [order[i] // 4 for i in own])
    plain = list(train.plain_batches(train.load(args)[1], args, rank, world))
    plain, labels = map(torch.cat, zip(*plain))
    square = images[..., 2:30, 10:38] if streamed else images
    assert_close(plain * STD + MEAN, square[rank::world] / 255, 1e-6)
    assert labels.tolist() == [i // 4 for i in range(rank, 8, world)]
    assert workers_seen == ({workers} if streamed else {workers, 0})  # what is held needs none


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_from_its_archive_or_named(name, tmp_path, monkeypatch):
    line = f"--dataset {name} --data-dir {tmp_path} --workers 0"
    monkeypatch.setattr("urllib.request.urlopen", None)  # so that a download fails
    sentence = f"^{name}: .*not callable; --data-dir DIR must have its archive .or try shapes.$"
    with pytest.raises(SystemExit, match=sentence):
        train.load(parse(line))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    kind, images, labels = getattr(torchvision.datasets, name.upper()), pictures(8), list(range(8))
    content = dict(data=images.flatten(1).numpy(), labels=labels, fine_labels=labels)
    content[kind.meta["key"]] = list("abcdefgh")
    (tmp_path / kind.base_folder).mkdir(exist_ok=True)
    for file, _ in (*kind.train_list, *kind.test_list, (kind.meta["filename"], "")):
        (tmp_path / kind.base_folder / file).write_bytes(pickle.dumps(content))
    data, _, classes = train.load(parse(line))
    files = len(kind.train_list)
    assert classes == list("abcdefgh")
    assert_close(data[:], (images.repeat(files, 1, 1, 1), torch.tensor(labels * files)))


# --- Settings -------------------------------------------------------------------------------------


BAD_OPTIONS = (
    "--foo 1|--criterion foo|--arch foo|--set foo=1|--set covariance=x|--set covariance|--lr nan"
    "|--set covariance=nan|--set covariance=1e400|--criterion tcr --set eps=0|--criterion simclr"
    " --set temperature=-1|--criterion dcl --set negatives=foo|--criterion chain --set t=7|--lr inf"
    "|--views foo=1|--views grey=7|--views crop=-1|--views hue=nan|--epochs 0|--epochs 2.5"
    "|--batch-size 1|--weight-decay -1|--warmup 2|--workers -1|--projector 12--3|--projector 0"
    "|--seed -1|--projector 99999999999|--image-size 4|--batch-size 7"
)


@pytest.mark.parametrize("options", BAD_OPTIONS.split("|"))
def test_bad_options_end_in_one_sentence(options, monkeypatch, capsys):
    monkeypatch.setattr(train, "WORLD", 2)  # among which a batch is divided
    with pytest.raises(SystemExit, match="2"):
        parse(f"--dataset shapes {options}")
    assert re.search("\ntrain.py: error: .+\n$", capsys.readouterr().err)


def register(own, monkeypatch):
    """Makes a function the criterion "own" until the end of the test."""
    own.__name__ = "own"
    monkeypatch.setitem(CRITERIA, "own", None)
    duality.criterion(own)


def readme(name):
    text = (HERE / "README.md").read_text()
    return re.search(rf"<!-- {name} -->\n```python\n(.*?)```", text, re.S)[1]


def test_hyperparameters_keep_their_types(monkeypatch, capsys):
    register(lambda za, zb, on=True, weight=25, rate=1.0, kind="a": dict(a=za.sum()), monkeypatch)
    line = "--dataset shapes --criterion own --set on=False rate=2 --set kind=1 rate=3"
    assert repr(parse(line).set) == repr(dict(on=False, weight=25, rate=3.0, kind="1"))
    for bad in ("weight=2.5", "on=2", "rate=x"):
        with pytest.raises(SystemExit):
            parse(f"{line} {bad}")
        assert f"{bad}: choose from on=True, weight=25, rate=" in capsys.readouterr().err


def test_a_loss_of_ones_own_may_be_one_tensor_and_need_many_samples(monkeypatch):
    register(lambda a, b: torch.linalg.cholesky(a.T.cov()).sum() + a[4].sum(), monkeypatch)
    assert CRITERIA["own"].terms(*two_views(9, 5))["loss"] == CRITERIA["own"](*two_views(9, 5))
    assert parse("--dataset shapes --criterion own --projector 32-5").batch_size == 64


@pytest.mark.parametrize(
    "found", [None, 1.0, torch.ones(1), [torch.ones(())], {}, dict(a=torch.ones(()), b=1.0)]
)
def test_what_is_no_loss_is_refused(found, monkeypatch, capsys):
    register(lambda za, zb: found, monkeypatch)
    sentence = "own must return a 0-d tensor or a dict of them"
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        CRITERIA["own"](*two_views(4, 3))
    with pytest.raises(SystemExit, match="2"):
        parse("--dataset shapes --criterion own")
    assert capsys.readouterr().err.endswith(f"\ntrain.py: error: {sentence}\n")
    with pytest.raises(TypeError, match="'weight'"):
        register(lambda za, zb, weight: dict(a=weight * za.sum()), monkeypatch)


def test_readmes_own_loop_and_own_loss(monkeypatch):
    zs = two_views(12, 5)
    loop = dict(za=zs[0], zb=zs[1])
    exec(readme("loop"), loop)
    assert loop["loss"] == sum(loop["terms"].values()) == duality.vicreg(*zs)
    monkeypatch.setattr(duality, "CRITERIA", {})
    exec(readme("frossl"), dict(vars(duality)))
    za, zb = (standardized(z) / len(z) ** 0.5 for z in zs)
    repulsion = sum((z.T @ z).square().sum().log() for z in (za, zb))
    assert_equal([duality.CRITERIA["frossl"](*zs)], [repulsion + (za - zb).square().sum() / 12])


# --- Model and optimizer --------------------------------------------------------------------------


def new_model(arch, image_size, projector, classes, zero_init=False):
    settings = dict(arch=arch, image_size=image_size, projector=projector, classes=classes)
    return train.Model(argparse.Namespace(**settings, zero_init=zero_init))


@pytest.mark.parametrize("kind", train.OPTIMIZERS)
def test_optimizers_are_their_formulas(kind):
    torch.manual_seed(0)
    model = new_model("small", 8, [16, 8], 4)
    model.encoder[0].weight.data.zero_()
    expected = copy.deepcopy(model)
    *weights, _ = (w for w in expected.parameters() if w.ndim > 1)  # the last one is the probe's
    others = [w for w in expected.parameters() if w.ndim == 1 and w is not expected.probe[1].bias]
    groups = [dict(params=weights, weight_decay=0.01), dict(params=others, weight_decay=0)]
    line = f"--dataset shapes --optimizer {kind} --lr 0.3 --weight-decay 0.01 --eta 0.05"
    main = torch.optim.AdamW if kind == "adamw" else partial(torch.optim.SGD, momentum=0.9)
    main = main(groups, 0.3 if kind == "adamw" else 0.3 * 64 / 256)  # the batch size is 64
    probe = torch.optim.AdamW(expected.probe.parameters(), 1e-2, weight_decay=0)
    optimizers = main, probe, *train.build_optimizers(parse(line), model)
    for scale in (1.0, 1e-4, 10.0):
        for param, w in zip(model.parameters(), expected.parameters()):
            param.grad = scale * torch.randn_like(w)
            w.grad = param.grad.clone()
        for w in weights if kind == "lars" else []:
            gradient = w.grad + 0.01 * w.detach()
            ratio = 0.05 * w.norm() / gradient.norm() if w.norm() > 0 else 1
            w.grad = ratio * gradient - 0.01 * w.detach()  # to which SGD adds the decay
        for optimizer in optimizers:
            optimizer.step()
        assert_close(dict(model.state_dict()), dict(expected.state_dict()), 1e-6, 1e-5)


def test_imagenets_first_step_is_vicregs():
    args = parse("--dataset imagenet --warmup 0")  # at a rate of 1.2 = 0.3 x 1024 / 256
    model = new_model("resnet18", 224, [64, 32], 4, args.zero_init)
    assert not any(block.bn2.weight.any() for block in model.encoder.layer2)
    default = new_model("resnet18", 224, [64, 32], 4, parse("").zero_init)
    assert default.encoder.layer2[0].bn2.weight.all()
    optimizer, _ = train.build_optimizers(args, model)
    weights = [param for param in model.parameters() if param.ndim > 1]
    before = [w.detach().clone() for w in weights]
    for w in weights[1:-1]:  # the first is frozen, the last the probe's
        w.grad = torch.randn_like(w)
    assert train.schedule(0, 1000, args.warmup) == 1
    optimizer.step()
    shares = [(w.detach() - old).norm() / old.norm() for w, old in zip(weights, before)]
    assert shares == pytest.approx([0, *(len(shares) - 2) * [1.2 * 0.001], 0], rel=1e-4)


def test_probe_is_linear_in_standardized_features_and_sends_no_gradient_back():
    model, images = new_model("small", 32, [8], 4), torch.randn(4, 3, 32, 32)
    _, logits = model(images)
    assert_close(logits, model.probe[1](standardized(model.encoder(images))), 1e-5)
    logits.sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"probe.1.weight", "probe.1.bias"}


# --- Programs -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of two classes, dark and light, with 40 images for training and 15 for testing."""
    root = tmp_path_factory.mktemp("images")
    pixels = pictures(40, 10, 12) // 2 + 127 * (torch.arange(40) % 2).byte()[:, None, None, None]
    save_images(root, pixels, splits=["train"])
    # the other way round and not as many of both, so that no accuracy is the training set's
    save_images(root, pixels[1:16] ^ 3, splits=["test"])
    return root


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def command(images, out):
    """The options of a run in a new folder, with five steps an epoch."""
    line = f"--dataset folder --data-dir {images} --out {out} --arch small --workers 0"
    return f"{line} --image-size 8 --batch-size 8 --projector 16-8 --precision fp32 --device cpu"


def train_here(line):
    train.main(parse(line))


def run_script(line, streamed):
    sys.argv = line.split()
    source = (HERE / sys.argv[0]).read_text()
    source = source.replace("HELD_BYTES = 4", "HELD_BYTES = 0") if streamed else source
    exec(compile(source, sys.argv[0], "exec"), {"__name__": "__main__"})


def be_program(line, output, streamed=False, before=list, launch=None):
    """Runs a program after a function, by default one that does nothing, perhaps in a launcher."""
    os.setpgrp()
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    multiprocessing.set_start_method("fork", force=True)
    before()
    run = elastic_launch(LaunchConfig(**launch), run_script) if launch else run_script
    run(line, streamed)


def start(line, output, **options):
    """Starts train.py or eval.py, forked from a server that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=be_program, args=(line, output), kwargs=options)
    process.start()
    return process, output


def end(program, signal_number=0, until=lambda: True):
    """(exit status, output) of a program that perhaps gets a signal as soon as until() is true."""
    process, output = program
    while process.is_alive() and not until():
        time.sleep(0.005)
    if signal_number:
        os.killpg(process.pid, signal_number)
    process.join(1800)
    return process.exitcode, output.read_text()


def file_contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".owner"}


def load(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def log_of(out, *names):
    """These values of all lines of a log that is perhaps just being written."""
    log = out / "log.jsonl"
    lines = re.findall("(.*)\n", log.read_text() if log.exists() else "")
    return [[json.loads(line)[name] for name in names] for line in lines]


SAME = "step", "probe_train", "probe_test"


def assert_same_run(found, expected, tolerance=1e-5):
    assert log_of(found, *SAME) == log_of(expected, *SAME)
    found, expected = (load(run)["state_dicts"]["model"] for run in (found, expected))
    for name, weight in expected.items():
        # a bias may begin at 0: its layer tells what is small
        layer = expected[name.replace(".bias", ".weight")].double()
        assert (found[name] - weight).double().norm() <= tolerance * layer.norm(), name


# --- A run ----------------------------------------------------------------------------------------

SGD = "--optimizer sgd --lr 0.2 --weight-decay 0.01 --criterion simclr --set temperature=0.5"


def accuracy(logits, labels):
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def untrained_model():
    torch.manual_seed(3)
    return new_model("small", 8, [16, 8], 2).to(memory_format=torch.channels_last)


def plain_images(data):
    return TF.normalize(data.tensors[0] / 255, train.MEAN, train.STD)


def test_a_run_is_its_plain_loop(command, out):
    line = f"{command} {SGD} --epochs 4 --warmup 0.2 --seed 3"
    args, model, expected = parse(line), untrained_model(), []
    data, test, _ = train.load(args)
    main, probe = train.build_optimizers(args, model)
    for step, (views, labels) in enumerate(train.training_batches(data, args, 0)):
        rise = (step + 1) / 4 if step < 4 else (1 + math.cos(math.pi * (step - 4) / 16)) / 2
        for group in main.param_groups:
            group["lr"] = lr = 0.2 * 8 / 256 * rise
        (za, zb), logits = (x.unflatten(0, (2, 8)) for x in model.train()(views))
        loss = duality.simclr(za, zb, temperature=0.5)
        (loss + sum(F.cross_entropy(x, labels) for x in logits) / 2).backward()
        for optimizer in (main, probe):
            optimizer.step()
            optimizer.zero_grad()
        if step % 5 == 4:  # an epoch ends
            top1 = accuracy(logits.flatten(0, 1), labels.repeat(2))
            _, logits = model.eval()(plain_images(test))
            rankme = duality.rankme(za.detach().double())
            values = loss.detach(), top1, accuracy(logits, test.tensors[1]), rankme
            expected.append([step + 1, lr, *map(float, values)])
    train_here(line)
    found = log_of(out, "step", "lr", "loss", "probe_train", "probe_test", "rankme")
    assert found == [pytest.approx(line, rel=1e-4) for line in expected]
    assert_close(load(out)["state_dicts"]["model"], dict(model.state_dict()), 1e-5, 1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16 --compile"])
def test_precision_and_compilation(precision, command, monkeypatch):
    found, compiled, forward = [], [], train.Model.forward

    def look(model, images):
        embeddings, logits = forward(model, images)
        found.append((model.training, embeddings.dtype))
        return embeddings, logits

    def compile(part, disable=False, **_):
        compiled.extend([] if disable else [getattr(part, "__name__", type(part).__name__)])
        return part

    monkeypatch.setattr(train.Model, "forward", look)
    monkeypatch.setattr(torch, "compile", compile)
    train_here(f"{command} --epochs 1 --precision {precision}")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    assert found == 5 * [(True, dtype)] + [(False, dtype)]
    assert compiled == ([] if precision == "fp32" else ["partial", "Model", "augment"])


# --- Several processes ----------------------------------------------------------------------------


def gradients_and_statistics(rank=0, world=1, weight=1):
    """Of a step with a process's part of a batch, whose loss has its own weight."""
    torch.manual_seed(0)
    model = new_model("small", 8, [12, 7], 5).double()
    for param in model.parameters():
        torch.nn.init.normal_(param, 0.1, 0.2)
    views, labels = torch.randn(2, 12, 3, 8, 8).double(), torch.arange(12) % 5
    net = train.distribute(model, argparse.Namespace(device="cpu")) if world > 1 else model
    embeddings, logits = net(views.chunk(world, 1)[rank].flatten(0, 1))
    za, zb = (duality.gather(z) for z in embeddings.chunk(2))
    loss = sum(criterion(za, zb) for criterion in CRITERIA.values())
    # depends on the order of samples; its views share a gradient, which no gather may change
    loss = loss + ((za + zb).square() * torch.arange(12)[:, None]).sum()
    probe_loss = F.cross_entropy(logits, labels.chunk(world)[rank].repeat(2))
    (weight * loss + probe_loss).backward()
    found = {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())
    return found | dict(loss=loss.detach())


def step_in_process(rank, world, folder):
    train.RANK, train.WORLD, meet = rank, world, f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", meet, rank=rank, world_size=world)
    torch.save(gradients_and_statistics(rank, world, rank), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_processes_have_the_gradients_and_statistics_of_one(world, tmp_path):
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    arguments = dict(args=(world, str(tmp_path)), nprocs=world, start_method="forkserver")
    torch.multiprocessing.start_processes(step_in_process, **arguments)
    expected = gradients_and_statistics(weight=sum(range(world)) / world)
    for rank in range(world):
        assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, 1e-12, 1e-9)
    assert duality.gather(expected["loss"]) is expected["loss"]  # without other processes


SEVERAL = "--criterion simclr --optimizer lars --lr 0.05"  # larger rates let rounding grow


def test_torchruns_processes_train_as_one(command, tmp_path, out):
    line = f"{command} {SEVERAL} --epochs 3"
    launcher = f"-m torch.distributed.run --nproc-per-node 2 --master-port {get_free_port()}"
    words = f"{sys.executable} {launcher} {HERE}/train.py {line}".split()
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (result.stderr.count("2 x cpu fp32"), "Warning" in result.stderr) == (1, False)
    train_here(f"{line} --out {tmp_path}/one")
    assert_same_run(out, tmp_path / "one")


@pytest.mark.parametrize("rank, local_rank, barriers", [(0, 0, 0), (2, 0, 1), (1, 1, 2)])
def test_one_process_and_one_of_each_node_read_first(rank, local_rank, barriers, monkeypatch):
    seen = []
    found = dict(WORLD=4, RANK=rank, LOCAL_RANK=local_rank, load=lambda args: seen.index("load"))
    for name, value in dict(found, join=lambda *args: None).items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: seen.append("barrier"))
    with pytest.raises(ValueError, match="load"):
        train_here("--dataset shapes")
    assert len(seen) == barriers


def two_nodes(lines, folder):
    """[(exit status, output)] of torchrun's launchers on two nodes, of one process each."""
    meet = dict(rdzv_backend="static", rdzv_endpoint=f"127.0.0.1:{get_free_port()}")
    launch = dict(meet, min_nodes=2, max_nodes=2, nproc_per_node=1, run_id="0", start_method="fork")
    nodes = [dict(launch, max_restarts=0, rdzv_configs=dict(rank=k)) for k in (0, 1)]
    nodes = [start(line, folder / f"o{k}", launch=nodes[k]) for k, line in enumerate(lines)]
    return [end(node) for node in nodes]


@pytest.mark.parametrize("shared", [True, False])
def test_two_nodes_train_resume_and_find_the_run_complete(shared, command, tmp_path, out):
    other = out if shared else tmp_path / "other"
    for epochs, said in ((1, "next: python"), (2, "next: python"), (2, "is complete")):
        line = f"{command} {SEVERAL} --epochs {epochs}"
        nodes = two_nodes([f"train.py {line} --out {each}" for each in (out, other)], tmp_path)
        assert [status for status, _ in nodes] == [0, 0], nodes
        assert said in nodes[0][1].splitlines()[-1] and said not in nodes[1][1]
        train_here(f"{line} --out {tmp_path}/one")
        assert_same_run(out, tmp_path / "one")
    assert shared or not other.exists()


def test_a_node_without_its_data_says_so_and_both_end(command, tmp_path):
    line = f"train.py {command}"
    (status, _), (other_status, output) = two_nodes([line, f"{line} --data-dir /none"], tmp_path)
    assert status and other_status
    assert output.count("/none/train'; --data-dir DIR must have") == 1, output


# --- Interrupted runs -----------------------------------------------------------------------------


STOPPED = "\nstopped; the same command goes on from the last checkpoint\n"


@held_or_streamed
def test_killed_and_interrupted_runs_go_on_to_the_same_weights(streamed, command, tmp_path, out):
    line = f"train.py {command} --epochs 12 --save-every 0.04 --workers {int(streamed)}"
    begin = partial(start, output=tmp_path / "output", streamed=streamed)
    whole, draw = begin(f"{line} --out {tmp_path}/whole"), random.Random(0)
    for least, number in ((0, signal.SIGKILL), (10, signal.SIGINT), (20, signal.SIGKILL)):
        last = max([[least + draw.randrange(10)], *log_of(out, "step")])  # so it has begun, too
        status, output = end(begin(line), number, lambda: log_of(out, "step")[-1:] > [last])  # noqa: B023
        assert (status, "Traceback" in output) == (1 if least == 10 else -number, False), output
        assert output.count(STOPPED.strip()) == (least >= 10), output  # workers keep silent
    (out / ".part-0").touch()  # as if it had been killed while it wrote
    assert end(begin(line))[0] == end(whole)[0] == 0
    assert len(log_of(out, "step")) == 60 / 5
    assert sorted(file_contents(out)) == ["checkpoint.pt", "encoder.pt", "log.jsonl"]
    assert log_of(out, *SAME) == log_of(tmp_path / "whole", *SAME)
    assert_close(load(out)["state_dicts"], load(tmp_path / "whole")["state_dicts"])


def interrupted(za, zb):
    """In training, sends Ctrl-C from a destructor, out of which Python lets no exception."""
    if za.requires_grad:
        type("", (), dict(__del__=lambda self: os.kill(os.getpid(), signal.SIGINT)))()
    return F.mse_loss(za, zb)


def test_an_interrupt_in_a_destructor_is_not_lost(command, tmp_path):
    line = f"train.py {command} --criterion interrupted --epochs 2"
    register_it = partial(duality.criterion, interrupted)
    status, output = end(start(line, tmp_path / "o", before=register_it))
    assert status == 1 and output.endswith(STOPPED)


def assert_refused(line, out, sentence):
    """Checks that train.py ends with a sentence and leaves the run's folder as it is."""
    before = file_contents(out)
    with pytest.raises(SystemExit, match=f"^[^\n]*{sentence}[^\n]*$"):
        train_here(line)
    assert file_contents(out) == before


def test_which_checkpoints_a_run_goes_on_from(command, out, capsys):
    train_here(f"{command} --epochs 1")
    saved, more = load(out), f"{command} --epochs 2"
    good, weights = ((out / name).read_bytes() for name in ("checkpoint.pt", "encoder.pt"))
    for damaged in (b"", b"text", good[: len(good) // 2], bytes(99) + good[99:], weights):
        (out / "checkpoint.pt").write_bytes(damaged)
        assert_refused(more, out, "checkpoint.pt is damaged")
    may_change = "epochs data_dir device workers out save_every compile".split()
    for name in saved["settings"].keys() - set(may_change):
        torch.save(dict(saved, settings=saved["settings"] | {name: "old"}), out / "checkpoint.pt")
        assert_refused(more, out, f"run has a run with {name} old, not .*: name another --out")
    changed = saved["settings"] | dict.fromkeys(may_change, "old") | dict(epochs=1, gone=0)
    del changed["warmup"]  # as if the checkpoint were of another version, with other options
    torch.save(dict(saved, settings=changed), out / "checkpoint.pt")
    train_here(more)
    before = file_contents(out)
    train_here(more)
    assert file_contents(out) == before and "is complete" in capsys.readouterr().err
    assert log_of(out, "step") == [[5], [10]]


CHANGES = {
    "touch": lambda out: os.utime(out / "checkpoint.pt", (0, 0)),
    "no checkpoint": lambda out: (out / "checkpoint.pt").unlink(missing_ok=True),
    "no folder": shutil.rmtree,
    "another run": lambda out: train.begin(out) or (out / ".owner").write_text("another"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_only_another_run_in_its_folder_ends_a_healthy_run(change, monkeypatch, command, out):
    def careless(za, zb):
        if log_of(out, "step")[-1:] == [[5]]:
            CHANGES[change](out)
        return F.mse_loss(za, zb)

    register(careless, monkeypatch)
    line = f"{command} --criterion own --epochs 2 --save-every 0"
    if change == "another run":
        with pytest.raises(SystemExit, match=f"^another run has begun in {out}, so this one ends$"):
            train_here(line)
        assert load(out)["step"] == 5  # from where the other one goes on
        monkeypatch.setitem(CHANGES, change, lambda out: None)
    train_here(line)
    assert (load(out)["step"], len(log_of(out, "step"))) == (10, 2)
    assert sorted(file_contents(out)) == ["checkpoint.pt", "encoder.pt", "log.jsonl"]


NOT_FINITE = {1e9: "not finite: .*nan.*", 0: "weights are not finite at step 9"}


@pytest.mark.parametrize("seconds, what", NOT_FINITE.items())
def test_what_is_not_finite_is_not_saved(seconds, what, monkeypatch, command, out):
    begun = []  # at each call; the first is that of the settings' check, the tenth breaks step 8

    def fragile(za, zb):
        begun.append((out / ".owner").exists())
        surprise = (0 * za.sum()) ** (0.5 if len(begun) > 9 else 1)  # its gradient is 0 / 0
        return dict(invariance=F.mse_loss(za, zb), surprise=surprise)

    register(fragile, monkeypatch)
    with pytest.raises(SystemExit, match=f"^{what}; .*run keeps its checkpoint$"):
        train_here(f"{command} --criterion own --epochs 4 --save-every {seconds}")
    assert begun[:2] == [False, True]  # by which another run sees that this one has begun
    assert (not (out / "checkpoint.pt").exists()) if seconds else load(out)["step"] == 8


@pytest.mark.parametrize("written", [[], ["log.jsonl"], ["log.jsonl", "encoder.pt"]])
def test_a_full_disk_leaves_the_checkpoint(written, command, tmp_path, out):
    train_here(f"{command} --epochs 1")
    saved, line = load(out), f"{command} --epochs 9"
    # a log that is longer than the program's output, which the limit on a file's size then spares
    torch.save(dict(saved, log=2000 * saved["log"]), out / "checkpoint.pt")
    train_here(f"{command} --epochs 2")
    before = file_contents(out)
    largest = min(len(before[name]) for name in before.keys() - set(written)) - 200_000
    assert largest > 500_000
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (largest, largest))
    status, output = end(start(f"train.py {line}", tmp_path / "o", before=limit))
    assert status == 1 and output.count("train.py: [Errno 27] File too large\n") == 1, output
    after = file_contents(out)
    assert [name for name in sorted(before) if after[name] != before[name]] == sorted(written)
    train_here(line)
    assert log_of(out, "step")[2000:] == [[step] for step in range(10, 50, 5)]


FILE = "train/a/06 ä.png"
BAD_IMAGES = {
    f"{FILE}: .*more than 8 bits": lambda root: Image.new("I;16", (9, 9), 31843).save(root / FILE),
    f"{FILE}: .*mode F has more": lambda root: Image.new("F", (9, 9)).save(root / FILE, "tiff"),
    f"{FILE}: image file is truncated": lambda root: os.truncate(root / FILE, 1000),
    "/train'; --data-dir DIR must have": lambda root: (root / "train").rename(root / "x"),
    "/test'; --data-dir DIR must have": lambda root: (root / "test").rename(root / "x"),
    "class.* new.*; --data-dir DIR must": lambda root: (root / "train" / "new").mkdir(),
    "class b is not in both .* and .*": lambda root: (root / "test/b").rename(root / "x"),
}


@held_or_streamed
@pytest.mark.parametrize("reason", BAD_IMAGES)
def test_images_that_are_missing_or_cannot_be_read_are_named(reason, streamed, command, tmp_path):
    save_images(tmp_path, pictures(16), "ab")
    BAD_IMAGES[reason](tmp_path)
    line = f"train.py {command} --data-dir {tmp_path} --workers {2 * streamed}"
    status, output = end(start(line, tmp_path / "output", streamed=streamed))
    assert (status, "Traceback" in output) == (1, False), output
    assert re.search(reason, output.splitlines()[-1]), output


# --- Evaluation -----------------------------------------------------------------------------------


def test_probes_are_softmax_regression_and_weighted_votes():
    torch.manual_seed(0)
    y, test_y = torch.randint(0, 8, (2, 900))
    x, test_x = (5 + torch.randn(900, 20) + F.one_hot(k, 20) for k in (y, test_y))
    z, test_z = (F.pad((k - x.mean(0)) / x.std(0), (0, 1), value=1) for k in (x, test_x + 1))
    weights = torch.zeros(21, 8, requires_grad=True)
    optimizer = torch.optim.AdamW([weights], weight_decay=1e-4)
    for epoch in range(12):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 + math.cos(math.pi * epoch / 12)) / 2
        optimizer.zero_grad()
        F.cross_entropy(z @ weights, y).backward()
        optimizer.step()
    hits = (test_z @ weights).argsort(1, descending=True) == test_y[:, None]
    expected = [100 * hits[:, :k].any(1).double().mean().item() for k in (1, 5)]
    found = evaluation.linear_probe(x, y, test_x + 1, test_y, 8, epochs=12)
    assert found == pytest.approx(expected, abs=0.3)
    votes = torch.zeros(900, 8)
    for vote, cosines in zip(votes, unit(test_x) @ unit(x).T):
        for i in cosines.argsort(descending=True)[:7]:
            vote[y[i]] += (cosines[i] / 0.07).exp()
    found = evaluation.knn(x, y, test_x, test_y, 8, k=7)
    assert found == pytest.approx(accuracy(votes, test_y), abs=0.2)


@pytest.mark.parametrize("options", ["", "--random-init", "--data-dir {}/three"])
def test_an_evaluation_is_its_plain_one(options, command, images, tmp_path, out):
    save_images(tmp_path / "three", pictures(90, 9, 9)[:30], "abc", ["train"])
    save_images(tmp_path / "three", pictures(90, 9, 9)[30:], "abc", ["test"])
    train_here(f"{command} {SGD} --epochs 1 --seed 3")
    before, model, trained = file_contents(out), untrained_model().eval(), "random" not in options
    line = f"{out} --device cpu --epochs 3 --k 7 {options.format(tmp_path)}"
    args = evaluation.parse_args(line.split())
    found = evaluation.evaluate(out, args)
    assert file_contents(out) == before
    if trained:
        model.load_state_dict(load(out)["state_dicts"]["model"])
    *sets, classes = train.load(parse(f"{command} --data-dir {args.data_dir or images}"))
    features = [x for d in sets for x in (model.encoder(plain_images(d)).detach(), d.tensors[1])]
    z = model.projector(features[2]).detach()
    batch = unit(z[torch.randperm(len(z), generator=train.generator(0))[:8]])
    cosines, squares = off_diagonal(batch @ batch.T), batch.square().sum(0).square().sum()
    top1, top5 = evaluation.linear_probe(*features, len(classes), epochs=3)
    expected = dict(steps=5 * trained, linear_top1=top1, linear_top5=top5, k=7, features=256)
    expected |= dict(knn_top1=evaluation.knn(*features, len(classes), k=7), embeddings=8)
    expected |= dict(rankme=duality.rankme(features[2].double()), negative_mean=cosines.mean())
    expected |= dict(rankme_embeddings=duality.rankme(z.double()))
    expected |= dict(norms4_over_least=squares / (8**2 / 8), norms4_most_over_least=8)
    expected |= dict(negative_variance_times_d=8 * cosines.var(correction=0))
    expected = {name: pytest.approx(float(value), 1e-3, 1e-4) for name, value in expected.items()}
    assert found == dict(expected, criterion="simclr")


def test_an_encoder_is_contiguous_and_loads_into_torchvisions_resnet(command, out):
    train_here(f"{command} --epochs 1 --arch resnet18")
    namespace, x = {}, torch.rand(2, 3, 8, 8)
    exec(readme("encoder").replace("runs/resnet18", str(out)), namespace)
    model, weights = new_model("resnet18", 64, [16, 8], 2).eval(), load(out)["state_dicts"]["model"]
    model.load_state_dict(weights)
    assert torch.equal(namespace["model"].eval()(x), model.encoder(x))
    assert all(weight.is_contiguous() for weight in torch.load(out / "encoder.pt").values())
    assert not weights["encoder.layer1.0.conv1.weight"].is_contiguous()


def test_eval_py_and_its_failures(command, images, tmp_path, out, monkeypatch, capsys):
    def evaluate_here(line):
        monkeypatch.setattr(sys, "argv", ["eval.py", *line.split()])
        return evaluation.main()

    monkeypatch.chdir(images.parent)
    train_here(f"{command} --epochs 2 --data-dir {images.name} --out {os.path.relpath(out)}")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(out, "copy")
    Path("copy/eval.json").write_text("old")
    Path("copy/eval.new").mkdir()  # so that eval.json cannot be written, and the table is printed
    Path("broken").mkdir()
    Path("broken/checkpoint.pt").touch()
    capsys.readouterr()
    assert evaluate_here("none copy broken run --epochs 2")
    printed, said = capsys.readouterr()
    result = json.loads(Path("run/eval.json").read_text())
    texts = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in result.values()]
    table = [f"{name:30}{text}" for name, text in zip(result, texts)]
    assert printed.splitlines() == ["copy", *table, "run", *table]
    sentences = "none is no folder", ".*directory: 'copy/eval.new'", "broken/.* is damaged"
    assert re.fullmatch("".join(f"eval.py: {sentence}.*\n" for sentence in sentences), said)
    assert Path("copy/eval.json").read_text() == "old"
    assert not evaluate_here("run --epochs 2 --random-init")
    assert json.loads(Path("run/eval-random-init.json").read_text())["steps"] == 0

    drawn, draw = [], matplotlib.axes.Axes.plot
    record = lambda *args, **options: drawn.extend(draw(*args, **options)) or drawn[-1:]  # noqa: E731
    monkeypatch.setattr(matplotlib.axes.Axes, "plot", record)
    with pytest.raises(SystemExit, match="^copy/eval.json is damaged"):
        evaluate_here("copy --plot picture.png")
    evaluate_here("none broken run --plot picture.png")
    points, star = (line.get_xydata().tolist() for line in drawn[1:])  # after those of the copy
    assert points == [pytest.approx(line) for line in log_of(out, "step", "probe_test")]
    assert star == [[10, result["linear_top1"]]]
    assert Image.open(tmp_path / "picture.png").size == (900, 600)
    for line, sentence in (("none", "none is no folder"), ("run --plot x.abc", ".*'abc'")):
        status, output = end(start(f"eval.py {line.replace('run', str(out))}", tmp_path / line[:4]))
        assert status == 1 and re.fullmatch(f"eval.py: {sentence}.*\n", output), output
