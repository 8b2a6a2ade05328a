"""Tests: `pytest test_duality.py`. What the criteria cost: `python test_duality.py --benchmark`.

PLAIN has each criterion, slowly, from its formula; PUBLISHED the code that people use, restated with the same
operations. Then come the benchmark and the tests, in the order of duality.py.
"""
import argparse, inspect, itertools, json, math, os, re, runpy, statistics, tempfile, time
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F

import duality
from duality import CRITERIA

# --- Plain references: from the formula ---------------------------------------------------------------------
unit = lambda z: z / z.norm(dim=1, keepdim=True)
centered = lambda z: z - z.mean(0)
standardized = lambda z: centered(z) / (centered(z).square().mean(0) + 1e-5).sqrt()
spread = lambda z: standardized(z) / z.shape[1] ** 0.5
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

def plain_pair(za, zb, invariance=1.0, repulsion=1.0, k=lambda z: z):
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

def median_ms(run, device, budget):
    wait, times = torch.cuda.synchronize if device == "cuda" else lambda: None, []
    while not times or sum(times) < budget and len(times) < 50:
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)

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

def benchmark(device, sizes, names, budget):
    print(f"Loss and gradient in fp32; torch {torch.__version__}, {device}, {torch.get_num_threads()} threads"
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
        bare = median_ms(partial(products, name, *(z.detach() for z in leaves)), device, budget)
        for peer in [None, *(whose for criterion, whose in PUBLISHED if criterion == name)]:
            run = partial(step, PUBLISHED[name, peer] if peer else CRITERIA[name], *leaves)
            work, found = n * d * (n if name in ("simclr", "dcl") else d), []
            if peer and work > 15e3 * speeds.get((name, peer), math.inf) and (n, d) != (256, 8192):
                continue  # it would take more than 15 s
            start = time.perf_counter()
            mib = peak_mib(lambda: found.extend(run()), device)
            ms = 1e3 * (time.perf_counter() - start)
            ms = ms if ms > 2e3 else median_ms(run, device, budget)
            speeds[name, peer], accuracy = work / ms, "{:.1e} {:.1e}".format(*errors(found, exact))
            if not peer:
                ours = ms, mib
                row = f"{name:12} {n:4} {d:4} {matrix(name, leaves):13} {ms:6.1f} {mib:6.1f} {accuracy}"
            else:
                print(f"{row} | {peer:8} {ms:7.1f} {ms / ours[0]:5.1f} {mib:6.1f} {mib / ours[1]:5.1f} "
                      f"{accuracy} | {bare:6.1f} {ours[0] / bare:5.2f}", flush=True)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--benchmark", action="store_true", required=True)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--criteria", nargs="+", metavar="NAME", choices={name for name, _ in PUBLISHED},
                        default=["vicreg", "barlow-twins", "simclr", "vicreg-exp"])
    parser.add_argument("--sizes", nargs="+", metavar="NxD", type=lambda size: [*map(int, size.split("x"))],
                        default=[[n, d] for n in (256, 512, 1024) for d in (512, 2048, 8192)])
    parser.add_argument("--seconds", type=float, default=0.4, help="of repeats, for each time measured")
    args = parser.parse_args()
    benchmark(args.device, args.sizes, args.criteria, args.seconds)
    raise SystemExit

# --- The tests ----------------------------------------------------------------------------------------------
import pytest
from hypothesis import given, settings, strategies as st

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
        cross = step(lambda a, b: off_diagonal(a @ b.T).square().sum(), a, b)
        same = step(lambda a: off_diagonal(a @ a.T).square().sum(), a)
        for route in (duality.direct_route, duality.dual_route, duality.off_diagonal):
            assert_equal(step(lambda a, b: route(a, b, (a * b).sum(1)), a, b), cross)
            assert_equal(step(lambda a: route(a, a, (a * a).sum(1)), a), same)

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
    monkeypatch.setattr(duality, "BLOCK", 15 * 16)
    assert matrix("vicreg-exp", views(8, 16)) == "D x D, blocks" and matrix("vicreg-exp", views(8, 15)) == "D x D"

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
@pytest.mark.parametrize("a, b", [
    ((4, 5), (4, 6)), ((4, 5), (5, 5)), ((4,), (4,)), ((2, 3, 4), (2, 3, 4)), ((1, 5), (1, 5))])
def test_bad_shapes(name, a, b):
    for function in (CRITERIA[name], CRITERIA[name].terms):
        with pytest.raises(ValueError, match=re.escape(f"{a} and {b}")):
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
        assert kind in DEGENERATE.values() or abs(value - sum(terms)) <= 1e-4 * (1 + sum(map(abs, terms)))
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
