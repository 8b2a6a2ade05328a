"""The duality between contrastive and non-contrastive self-supervised learning, in one file.

Garrido, Chen, Bardes, Najman, LeCun, ICLR 2023, arXiv 2206.02574.

Notation. The paper's K is (M, N), one column per sample. Here z = K^T is (N, D), D = M, one row z_i
per sample. The two views of N images are za and zb, in formulas z_i and z'_i, or K and K'.
x and y, (n, m), are any matrices whose n rows are compared: K^T (samples) or K (dimensions).

In order: theorem 3.3; dimension- and sample-contrastive criteria; their chain; tools; plumbing.

A criterion is written as a function f(za, zb, **hyperparameters) that returns its weighted terms.
@criterion adds them up: vicreg(za, zb) is the loss, vicreg.terms(za, zb) the dict of its terms.
"""

import functools
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.linalg import vecdot
from torch.utils.checkpoint import checkpoint

CRITERIA = {}  # name -> criterion, filled by @criterion
CHAIN = ("vicreg", "vicreg-exp", "vicreg-ctr", "simclr")
CPU_BLOCK, GPU_BLOCK = 2**22, 2**27  # entries that log_sum_exp holds at a time


def full_precision(function):
    """Makes a function compute in float32 (float64 if its tensors are), even under autocast."""

    @functools.wraps(function)
    def wrapper(z, *args, **kwargs):
        args = (z, *args)
        args = [x.float() if torch.is_tensor(x) and x.dtype != torch.float64 else x for x in args]
        with torch.autocast(z.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapper


# ---- Section 3: two criteria and a theorem -------------------------------------------------------


@full_precision
def L_c(z):
    """Sample-contrastive criterion of z (N, D), Def 3.2."""
    # L_c = ||K^T K - diag(K^T K)||_F^2
    return cheaper_route(z, z)[1]


def L_nc(z):
    """Dimension-contrastive criterion of z (N, D), Def 3.2."""
    # L_nc = ||K K^T - diag(K K^T)||_F^2
    return L_c(z.T)


@full_precision
def norms4(z):
    """Sum of the embeddings' norms to the fourth, for z (N, D). For the dimensions: norms4(z.T)."""
    # sum_i ||K_.,i||^4
    return vecdot(z, z).square().sum()


# Theorem 3.3:  L_nc + sum_j ||K_j,.||^4 = L_c + sum_i ||K_.,i||^4,  as ||K K^T||_F = ||K^T K||_F.
# The theorem is also an algorithm. The squared products of n rows of length m can be summed through
# the n x n matrix of the products, or through m x m matrices. Both routes take x and y, (n, m), and
# return the diagonal of X Y^T, (n,), and the sum of the squares of all other entries.


def direct_route(x, y):
    # second value: ||X Y^T - diag(X Y^T)||_F^2
    products = gram(x) if x is y else x @ y.T  # (n, n)
    diagonal = products.diagonal().clone()
    # row by row: on a CPU, the float32 norm of a whole large matrix loses digits
    return diagonal, products.fill_diagonal_(0).norm(dim=1).square().sum()


def dual_route(x, y):
    # second value: <X^T X, Y^T Y>_F - ||diag(X Y^T)||^2
    gram_x = gram(x.T)  # (m, m)
    gram_y = gram_x if x is y else gram(y.T)
    diagonal = vecdot(x, y)
    return diagonal, (gram_x * gram_y).sum() - diagonal.square().sum()


def cheaper_route(x, y):
    """Takes the dual route if n >= 2m: it is then cheaper, and its subtraction loses few digits."""
    # X Y^T has rank <= m, so if its diagonal is about constant, ||X Y^T||_F^2 >= (n/m) ||diag||^2:
    # for n >= 2m, at most half is subtracted.
    n, m = x.shape
    return dual_route(x, y) if n >= 2 * m else direct_route(x, y)


def lemma_3_4(n, m, a=1.0):
    """Bounds on norms4(z.T) for n embeddings of norm a in m dimensions. Dual: swap n and m."""
    # (N^2 / M) a^4 <= sum_j ||K_j,.||^4 <= N^2 a^4
    return n**2 / m * a**4, n**2 * a**4


def corollary_3_4_1(z):
    """Bounds on L_c(z), if embeddings have norm 1. For L_nc(z), if dimensions do, pass z.T."""
    # L_nc - N + N^2 / M <= L_c <= L_nc - N + N^2
    lower, upper = lemma_3_4(*z.shape)
    return L_nc(z) - len(z) + lower, L_nc(z) - len(z) + upper


# ---- What the criteria share ---------------------------------------------------------------------


def criterion(terms):
    """Makes a loss, listed in CRITERIA, of a function of two views that returns weighted terms.

    ValueError unless both views are (N, D), N > 1, D > 0. On a CPU, where values are cheap to read,
    the loss also raises it if it is not finite or an entry exceeds 1e15, a sign of divergence.
    """

    @functools.wraps(terms)
    def checked_terms(za, zb, *args, **kwargs):
        shapes = tuple(za.shape), tuple(zb.shape)
        if shapes[0] != shapes[1] or za.ndim != 2 or len(za) < 2 or za.shape[1] == 0:
            raise ValueError("expected two views (N, D), N > 1, D > 0, got {}, {}".format(*shapes))
        return full_precision(terms)(za, zb, *args, **kwargs)

    @functools.wraps(terms)
    def loss(za, zb, *args, **kwargs):
        total = sum(checked_terms(za, zb, *args, **kwargs).values())
        if total.device.type == "cpu":
            largest = max(abs(x.item()) for z in (za, zb) for x in z.detach().aminmax())
            if not (total.isfinite() and largest <= 1e15):
                raise ValueError(f"{terms.__name__} is {total:g} for entries of up to {largest:g}")
        return total

    loss.terms = checked_terms
    CRITERIA[terms.__name__.replace("_", "-")] = loss
    return loss


def center(z):
    """Centers each dimension to mean 0."""
    return z - z.mean(0)


def normalize(z):
    """Scales each embedding to norm 1; zero stays zero."""
    return F.normalize(z, dim=1)


def standardize(z, eps=1e-5):
    """Centers each dimension and scales it to norm sqrt(N), as batch norm does."""
    return F.batch_norm(z, None, None, training=True, eps=eps)


def spread(z):
    """Centers each dimension and scales it to norm sqrt(N / D), Eq 14: the RMS of norms is 1."""
    # centered first: with so small an eps, the rounding of a large mean would be scaled up too
    return standardize(center(z), eps=1e-30) / math.sqrt(z.shape[1])


def distance(za, zb):
    # 1/N sum_i ||z_i - z'_i||^2
    return za.shape[1] * F.mse_loss(za, zb)


# ---- Dimension-contrastive criteria (Prop 3.2) ---------------------------------------------------


def hinge(variances, eps=1e-4):
    # v(K) = 1/D sum_j max(0, 1 - sqrt(Var(K_j,.) + eps))
    return F.relu(1 - (variances + eps).sqrt()).mean()


def v_and_c(x):
    """VICReg's v(K) and c(K) for centered x = K (D, N)."""
    # C(K) = K K^T / (N - 1),  Var(K_j,.) = C(K)_jj,  c(K) = 1/D sum_{i != j} C(K)_ij^2
    D, N = x.shape
    diagonal, squares = cheaper_route(x, x)
    return hinge(diagonal / (N - 1)), squares / (N - 1) ** 2 / D


def vicreg_terms(za, zb, v, c, lambda_, mu, nu):
    # lambda / (N D) sum_i ||z_i - z'_i||^2 + mu / 2 (v(K) + v(K')) + nu (c(K) + c(K'))
    return dict(invariance=lambda_ * F.mse_loss(za, zb), variance=mu / 2 * v, covariance=nu * c)


@criterion
def vicreg(za, zb, invariance=25.0, variance=25.0, covariance=1.0):
    """VICReg (arXiv 2105.04906) as in its code: v is averaged over the views, c is summed."""
    va, ca = v_and_c(center(za).T)
    vb, cb = v_and_c(center(zb).T)
    return vicreg_terms(za, zb, va + vb, ca + cb, invariance, variance, covariance)


def v_and_c_contrastive(x):
    """The same v(K) and c(K), but in terms of L_c, Eq 9-10, for centered x = K (D, N)."""
    # c(K) = (L_c + L_reg) / (N - 1)^2 / D,  L_reg = sum_i ||K_.,i||^4 - sum_j ||K_j,.||^4
    D, N = x.shape
    squares = L_c(x.T) + norms4(x.T) - norms4(x)
    return hinge(vecdot(x, x) / (N - 1)), squares / (N - 1) ** 2 / D


@criterion
def vicreg_contrastive(za, zb, invariance=25.0, variance=25.0, covariance=1.0):
    """VICReg as a contrastive method, Eq 9-10: same value and gradient, less precise if N >> D."""
    va, ca = v_and_c_contrastive(center(za).T)
    vb, cb = v_and_c_contrastive(center(zb).T)
    return vicreg_terms(za, zb, va + vb, ca + cb, invariance, variance, covariance)


@criterion
def barlow_twins(za, zb, redundancy=0.0051):
    """Barlow Twins (arXiv 2103.03230). As in its code, batch norm adds 1e-5 to the variances."""
    # sum_j (1 - C_jj)^2 + lambda sum_{i != j} C_ij^2,  C = K K'^T / N of standardized dimensions
    n = len(za)
    diagonal, squares = cheaper_route(standardize(za).T, standardize(zb).T)
    on_diagonal = (1 - diagonal / n).square().sum()
    return dict(invariance=on_diagonal, redundancy=redundancy * squares / n**2)


def coding_rate(z, eps):
    # R(Z) = 1/2 logdet(I + D / (N eps^2) Z^T Z), by Sylvester's identity the same with Z Z^T
    n, d = z.shape
    matrix = d / (n * eps**2) * gram(z if n < d else z.T)
    identity = torch.eye(len(matrix), dtype=z.dtype, device=z.device)
    return torch.linalg.cholesky_ex(identity + matrix).L.diagonal().log().sum()


@criterion
def tcr(za, zb, invariance=1.0, eps=0.5):
    """Total coding rate (arXiv 2201.10000) of unit-norm embeddings, maximized, divided by N."""
    # lambda / N sum_i ||z_i - z'_i||^2 - (R(Z) + R(Z')) / (2N)
    za, zb = normalize(za), normalize(zb)
    rates = coding_rate(za, eps) + coding_rate(zb, eps)
    return dict(invariance=invariance * distance(za, zb), repulsion=-rates / (2 * len(za)))


@criterion
def dimension_contrastive(za, zb, invariance=25.0, repulsion=1.0):
    """L_nc plus an invariance term, on dimensions of mean 0 and norm sqrt(N / D)."""
    # lambda / N sum_i ||z_i - z'_i||^2 + nu / (2N) (L_nc(K) + L_nc(K'))
    za, zb = spread(za), spread(zb)
    mean = (L_nc(za) + L_nc(zb)) / (2 * len(za))
    return dict(invariance=invariance * distance(za, zb), repulsion=repulsion * mean)


# ---- Sample-contrastive criteria (Prop 3.1, 3.2) -------------------------------------------------


@criterion
def sample_contrastive(za, zb, invariance=25.0, repulsion=1.0):
    """L_c plus an invariance term, on dimensions of mean 0 and norm sqrt(N / D)."""
    # lambda / N sum_i ||z_i - z'_i||^2 + nu / (2N) (L_c(K) + L_c(K'))
    za, zb = spread(za), spread(zb)
    mean = (L_c(za) + L_c(zb)) / (2 * len(za))
    return dict(invariance=invariance * distance(za, zb), repulsion=repulsion * mean)


def log_sum_exp(x, temperature, scale=1, n_samples=None, similarity=lambda products: products):
    """For each row x_i of x (n, m): log sum_j exp(s(x_i . x_j) / (scale tau)), j in other samples.

    Rows i and i + n_samples are views of one sample. By default, each row is its own sample.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    n = len(x)

    def of_rows(rows, first):
        products = gram(x) if rows is x else rows @ x.T  # (rows, n)
        scores = similarity(products).div_(scale * temperature)
        # i = j on the diagonal with offset first; the sample's other view is n_samples away
        for offset in range(first - n, n, n_samples or n):
            scores.detach().diagonal(offset).fill_(-math.inf)  # exp(-inf) = 0: no gradient either
        return logsumexp(scores)

    height = max(1, (CPU_BLOCK if x.is_cpu else GPU_BLOCK) // n)  # rows of a block
    if height >= n:
        return of_rows(x, 0)
    recompute = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    parts = enumerate(x.split(height))
    return torch.cat([recompute(of_rows, rows, i * height) for i, rows in parts])


def nt_xent(za, zb, temperature, negatives, similarity=lambda products: products, dcl=False):
    """Pulls positives (z_i, z'_i) together, pushes negatives apart; averages over 2N anchors."""
    # mean over anchors i of -p_i / tau + log([exp(p_i / tau)] + sum_j exp(s(z_i . z_j) / tau)),
    # p_i = s(z_i . z'_i), j over the negatives of i; the bracket is dropped for DCL
    if negatives not in ("both", "own"):
        raise ValueError(f"negatives must be 'both' or 'own', not {negatives!r}")
    views = [torch.cat((za, zb))] if negatives == "both" else [za, zb]
    repulsion = torch.cat([log_sum_exp(z, temperature, 1, len(za), similarity) for z in views])
    positives = similarity(vecdot(za, zb)) / temperature  # (N,)
    if not dcl:
        repulsion = torch.logaddexp(repulsion, positives.repeat(2))
    return dict(invariance=-positives.mean(), repulsion=repulsion.mean())


@criterion
def simclr(za, zb, temperature=0.2, negatives="both"):
    """SimCLR (arXiv 2002.05709). Negatives of "both" views or, as in this paper, of the "own"."""
    return nt_xent(normalize(za), normalize(zb), temperature, negatives)


@criterion
def simclr_sq(za, zb, temperature=0.2, negatives="both"):
    """SimCLR with squared cosines, the positive's included."""
    return nt_xent(normalize(za), normalize(zb), temperature, negatives, torch.square)


@criterion
def simclr_abs(za, zb, temperature=0.2, negatives="both"):
    """SimCLR with absolute cosines, the positive's included."""
    return nt_xent(normalize(za), normalize(zb), temperature, negatives, torch.abs)


@criterion
def simclr_centered(za, zb, temperature=0.2, negatives="both"):
    """Variant A of table 1: dimensions of mean 0, then embeddings of norm 1."""
    return nt_xent(normalize(center(za)), normalize(center(zb)), temperature, negatives)


@criterion
def simclr_standardized(za, zb, temperature=0.2, negatives="both"):
    """Variant B of table 1, Eq 14: dimensions of mean 0 and norm sqrt(N / D), embeddings as is."""
    return nt_xent(spread(za), spread(zb), temperature, negatives)


@criterion
def dcl(za, zb, temperature=0.2, negatives="both"):
    """DCL (arXiv 2110.06848): SimCLR without the positive in the denominator. Can be negative."""
    return nt_xent(normalize(za), normalize(zb), temperature, negatives, dcl=True)


@criterion
def dcl_sq(za, zb, temperature=0.2, negatives="both"):
    """DCL with squared cosines, the positive's included."""
    return nt_xent(normalize(za), normalize(zb), temperature, negatives, torch.square, dcl=True)


@criterion
def dcl_abs(za, zb, temperature=0.2, negatives="both"):
    """DCL with absolute cosines, the positive's included."""
    return nt_xent(normalize(za), normalize(zb), temperature, negatives, torch.abs, dcl=True)


@criterion
def spectral(za, zb, radius=3.0):
    """Spectral contrastive loss (arXiv 2106.04156). Norms are clipped to radius, its sqrt(mu)."""
    # -2/N sum_i z_i . z'_i + 1 / (N (N - 1)) sum_{i != j} (z_i . z'_j)^2
    za, zb = (z * (radius / z.norm(dim=1, keepdim=True).clamp_min(radius)) for z in (za, zb))
    positives, squares = cheaper_route(za, zb)
    return dict(invariance=-2 * positives.mean(), repulsion=squares / len(za) / (len(za) - 1))


# ---- Section 4: the chain, vicreg -> vicreg_exp -> vicreg_ctr -> simclr --------------------------


def v_and_c_exp(x, temperature):
    """v(x) and c_exp(x) of x (n, m), which is K or K^T."""
    # C(x) = x x^T / (m - 1),  c_exp(x) = mean_i log sum_{j != i} exp(C(x)_ij / tau)
    # v takes the diagonal of C(x) for the variances, also for K^T, whose rows are not centered
    m = x.shape[1]
    return hinge(vecdot(x, x) / (m - 1)), log_sum_exp(x, temperature, scale=m - 1).mean()


@criterion
def vicreg_exp(za, zb, invariance=25.0, variance=25.0, covariance=25.0, temperature=0.1):
    """VICReg --LogSumExp--> VICReg-exp, Eq 11: c's sum of squares becomes a log-sum-exp."""
    va, ca = v_and_c_exp(center(za).T, temperature)
    vb, cb = v_and_c_exp(center(zb).T, temperature)
    return vicreg_terms(za, zb, va + vb, ca + cb, invariance, variance, covariance)


@criterion
def vicreg_ctr(za, zb, invariance=25.0, variance=25.0, covariance=25.0, temperature=0.2):
    """VICReg-exp --transpose--> VICReg-ctr, Eq 13: v and c_exp of K^T, with dimensions centered."""
    # v(K^T) raises norms to sqrt(D - 1); at that norm, the entries of C(K^T) are cosines
    va, ca = v_and_c_exp(center(za), temperature)
    vb, cb = v_and_c_exp(center(zb), temperature)
    return vicreg_terms(za, zb, va + vb, ca + cb, invariance, variance, covariance)


@criterion
def chain(za, zb, t=1.5):
    """Interpolates the chain: vicreg at t = 0, vicreg_exp at 1, vicreg_ctr at 2, simclr at 3."""
    # (k + 1 - t) loss_k + (t - k) loss_{k+1},  loss_k = CHAIN[k],  k = floor(t), at most 2
    if not 0 <= t <= 3:
        raise ValueError(f"t must be in [0, 3], not {t}")
    k = min(int(t), 2)
    terms = {}
    for name, weight in ((CHAIN[k], k + 1 - t), (CHAIN[k + 1], t - k)):
        if weight > 0:
            for key, term in CRITERIA[name].terms(za, zb).items():
                terms[f"{name} {key}"] = weight * term
    return terms


# ---- Tools ---------------------------------------------------------------------------------------


@torch.no_grad()
def diagnose(z):
    """Signs of collapse in z (N, D), and both sides of theorem 3.3, as 0-d float64 tensors.

    rankme is exp of the entropy of the normalized singular values (arXiv 2210.02885). negative_mean
    and negative_variance are over cosines of different samples: ideally 0 and 1 / D (Prop 3.1).
    """
    z = z.cpu().double() if z.device.type == "mps" else z.double()  # MPS has no float64
    n, d = z.shape
    pairs = n * (n - 1)
    singular_values = torch.linalg.eigvalsh(gram(z if n < d else z.T)).clamp_min(0).sqrt()
    p = singular_values / singular_values.sum().clamp_min(1e-300) + 1e-7
    # sum_{i != j} u_i . u_j = ||sum_i u_i||^2 - sum_i ||u_i||^2; the sum of their squares is L_c(u)
    u = normalize(z)
    mean = (u.sum(0).square().sum() - u.square().sum()) / pairs
    found = dict(std_mean=z.std(0).mean(), std_min=z.std(0).min())
    found.update(norm_mean=z.norm(dim=1).mean(), norm_std=z.norm(dim=1).std())
    found.update(rankme=(-p * p.log()).sum().exp(), L_c=L_c(z), L_nc=L_nc(z))
    found.update(theorem_left=found["L_nc"] + norms4(z.T), theorem_right=found["L_c"] + norms4(z))
    found.update(negative_mean=mean, negative_variance=L_c(u) / pairs - mean**2)
    return found


def gather(z):
    """Stacks the rows of all W processes by rank: (N / W, D) -> (N, D). No group: returns z.

    Every process then computes the full batch's loss, and DDP's average is its gradient.
    """
    return Gather.apply(z) if dist.is_available() and dist.is_initialized() else z


# ---- Plumbing: autograd functions ----------------------------------------------------------------


class Gram(torch.autograd.Function):
    """X X^T. Its gradient, (G + G^T) X, takes one matrix product; autograd's takes two."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x @ x.T

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return (grad + grad.T.contiguous()) @ x


class LogSumExp(torch.autograd.Function):
    """log sum_j exp(x_ij) of each row. Its gradient, a softmax, allocates a single matrix."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.logsumexp(1)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return x.softmax(1).mul_(grad[:, None])


class Gather(torch.autograd.Function):
    """Stacks all processes' rows. Backward: own rows of the gradient, summed over processes."""

    @staticmethod
    def forward(ctx, z):
        z = z.contiguous()
        parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, z)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


gram = Gram.apply
logsumexp = LogSumExp.apply


if __name__ == "__main__":
    z = torch.randn(256, 128, dtype=torch.float64)
    a, b = direct_route(z.T, z.T)[1], direct_route(z, z)[1]
    print(f"L_nc + sum_j ||K_j,.||^4 = {a:.2f} + {norms4(z.T):.2f} = {a + norms4(z.T):.4f}")
    print(f"L_c  + sum_i ||K_.,i||^4 = {b:.2f} + {norms4(z):.2f} = {b + norms4(z):.4f}")
