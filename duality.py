"""The duality between contrastive and non-contrastive self-supervised learning, in one file.

Garrido, Chen, Bardes, Najman, LeCun, ICLR 2023, arXiv 2206.02574.

Notation. The paper's K has a row K_j,. per dimension and a column K_.,i per image. Here z = K^T is
(N, D): one embedding z_i per image, N images in a batch, D dimensions (M in the paper). Each image
has two views, za and zb; formulas write z_i and z'_i for their rows, K and K' for their transposes.
"""

import functools
import inspect
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CRITERIA = {}  # name, with hyphens -> loss
BLOCK = 2**22  # products that log_sum_exp holds at a time; under torch.func, set it to math.inf


def criterion(function):
    """Makes a loss of a pure function of both views: no labels, no parameters, no state.

    It returns a dict of weighted terms or a tensor, the term "loss". Hyperparameters have defaults
    and are passed by name. Decorated, vicreg(za, zb) is the sum of its terms, vicreg.terms(za, zb)
    the dict, in float32 or float64, even under autocast. Both raise ValueError unless both views
    are (N, D), N > 1, D > 0. On a CPU, the sum also raises it if it is not finite.
    """
    inspect.signature(function).bind("za", "zb")  # TypeError if a hyperparameter has no default

    @functools.wraps(function)
    def terms(za, zb, **hyperparameters):
        if za.shape != zb.shape or za.ndim != 2 or len(za) < 2 or za.shape[1] == 0:
            raise ValueError(f"two views (N, D), N > 1, D > 0, needed: {za.shape}, {zb.shape}")
        dtype = torch.promote_types(za.dtype, torch.float32)
        with torch.autocast(za.device.type, enabled=False):
            found = function(za.to(dtype), zb.to(dtype), **hyperparameters)
        found = found if isinstance(found, dict) else dict(loss=found)
        if not found or not all(torch.is_tensor(x) and x.ndim == 0 for x in found.values()):
            raise ValueError(f"{function.__name__} must return a 0-d tensor or a dict of them")
        return found

    @functools.wraps(function)
    def loss(za, zb, **hyperparameters):
        total = sum(terms(za, zb, **hyperparameters).values())
        if total.is_cpu and not math.isfinite(total.item()):
            raise ValueError(f"{function.__name__} is {total:g}: views not finite, huge, or D = 1?")
        return total

    loss.terms = terms
    CRITERIA[function.__name__.replace("_", "-")] = loss
    return loss


# ---- Section 3: two criteria and a theorem -------------------------------------------------------

# Theorem 3.3:  L_nc + sum_j ||K_j,.||^4 = L_c + sum_i ||K_.,i||^4
# Proof. The sides are ||K K^T||_F^2 and ||K^T K||_F^2, sums of squared eigenvalues, and the two
# matrices share theirs, but for zeros. The algorithm: compute the smaller, whichever is asked for.


class Gram(torch.autograd.Function):
    """X X^T. Its gradient, (G + G^T) X, takes one matrix product; autograd's takes two."""

    @staticmethod
    def forward(x):
        with torch.autocast(x.device.type, enabled=False):  # L_c and others may be called under it
            return x @ x.T

    @staticmethod
    def setup_context(ctx, inputs, output):  # apart from forward, as torch.func asks for
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return (grad + grad.T.contiguous()) @ ctx.saved_tensors[0]  # a contiguous copy adds faster


gram = Gram.apply


def smaller_gram(x):
    """X X^T (n, n) or X^T X (m, m) of x (n, m), whichever is smaller."""
    return gram(x) if len(x) <= x.shape[1] else gram(x.T)


def diagonal_and_rest(x, y=None):
    """Diagonal (n,) of X Y^T, by default of X X^T, and the sum of squares of its other entries."""
    # ||X Y^T - diag(X Y^T)||_F^2 = <X^T X, Y^T Y>_F - sum_i (x_i . y_i)^2
    # Few digits cancel if Y = X has n > 1.2 m rows of one norm: over 1/6 of the first term is left
    n, m = x.shape
    if n <= 1.2 * m:
        products = gram(x) if y is None else x @ y.T
        rest = products.diagonal_scatter(x.new_zeros(n))
        return products.diagonal(), (rest * rest).sum()
    gram_x = gram(x.T)
    gram_y = gram_x if y is None else gram(y.T)
    diagonal = (x * (x if y is None else y)).sum(1)
    return diagonal, (gram_x * gram_y).sum() - diagonal.square().sum()


def L_c(z):
    """Sample-contrastive criterion ||K^T K - diag(K^T K)||_F^2 of z = K^T (N, D), Def 3.2."""
    return diagonal_and_rest(z)[1]


def L_nc(z):
    """Dimension-contrastive criterion ||K K^T - diag(K K^T)||_F^2 of z = K^T (N, D), Def 3.2."""
    return diagonal_and_rest(z.T)[1]


def norms4(z):
    """sum_i ||K_.,i||^4 of z = K^T (N, D), over embeddings. Over dimensions: norms4(z.T)."""
    return (z * z).sum(1).square().sum()


def lemma_3_4(n, m, a=1.0):
    """Bounds n^2 a^4 / m and n^2 a^4 of norms4(z.T), z (n, m) with rows of norm a."""
    return n**2 / m * a**4, n**2 * a**4


def corollary_3_4_1(z):
    """Bounds L_nc - N + N^2 / D and L_nc - N + N^2 of L_c(z), z (N, D) with rows of norm 1."""
    return tuple(L_nc(z) - len(z) + bound for bound in lemma_3_4(*z.shape))


# ---- What the criteria share ---------------------------------------------------------------------


def center(z):
    return z - z.sum(0) / len(z)  # each dimension to mean 0; cheaper backward than mean(0)


def standardize(z, eps=1e-5):
    """Centers each dimension and scales it to norm sqrt(N), as batch norm does."""
    return F.batch_norm(z, None, None, training=True, eps=eps)


def normalize_dimensions(z):
    """Centers each dimension and scales it to norm sqrt(N / D), Eq 14."""
    # less z_1, so that a constant dimension is exactly 0: standardize would scale up its rounding
    return standardize(z - z[0].detach(), eps=1e-30) / math.sqrt(z.shape[1])


def mean_squared_distance(za, zb):  # 1/N sum_i ||z_i - z'_i||^2
    return za.shape[1] * F.mse_loss(za, zb)


def squared_contrast(L, za, zb, invariance, repulsion):
    # invariance / N sum_i ||z_i - z'_i||^2 + repulsion / (2N) (L(K) + L(K'))
    za, zb = normalize_dimensions(za), normalize_dimensions(zb)
    attraction = invariance * mean_squared_distance(za, zb)
    return dict(invariance=attraction, repulsion=repulsion / (2 * len(za)) * (L(za) + L(zb)))


# ---- Dimension-contrastive criteria (Prop 3.2) ---------------------------------------------------


@criterion
def dimension_contrastive(za, zb, invariance=25.0, repulsion=1.0):
    """L_nc plus an invariance term, on dimensions of mean 0 and norm sqrt(N / D)."""
    return squared_contrast(L_nc, za, zb, invariance, repulsion)


def hinge(variances, eps=1e-4):
    # v = 1/n sum_i max(0, 1 - sqrt(C_ii + eps)),  C = X X^T / (m - 1) of X (n, m), K or K^T
    return F.relu(1 - (variances + eps).sqrt()).mean()


def v_and_c(z):
    # c = 1/D sum_{i != j} C_ij^2
    N, D = z.shape
    diagonal, squares = diagonal_and_rest(z.T)
    return hinge(diagonal / (N - 1)), squares / ((N - 1) ** 2 * D)


def vicreg_terms(za, zb, regularizers, lambda_, mu, nu):
    # lambda / (N D) sum_i ||z_i - z'_i||^2 + mu / 2 (v(K) + v(K')) + nu (c(K) + c(K'))
    (va, ca), (vb, cb) = regularizers(center(za)), regularizers(center(zb))
    s = F.mse_loss(za, zb)
    return dict(invariance=lambda_ * s, variance=mu / 2 * (va + vb), covariance=nu * (ca + cb))


@criterion
def vicreg(za, zb, invariance=25.0, variance=25.0, covariance=1.0):
    """VICReg (arXiv 2105.04906) as in its code: variances of views averaged, covariances added."""
    return vicreg_terms(za, zb, v_and_c, invariance, variance, covariance)


def v_and_c_contrastive(z):
    # c = (L_c + L_reg) / ((N - 1)^2 D),  L_reg = sum_i ||K_.,i||^4 - sum_j ||K_j,.||^4
    N, D = z.shape
    squares = L_c(z) + norms4(z) - norms4(z.T)
    return hinge((z * z).sum(0) / (N - 1)), squares / ((N - 1) ** 2 * D)


@criterion
def vicreg_contrastive(za, zb, invariance=25.0, variance=25.0, covariance=1.0):
    """VICReg as a contrastive method, Eq 9-10: equal to vicreg, but with more rounding errors."""
    return vicreg_terms(za, zb, v_and_c_contrastive, invariance, variance, covariance)


@criterion
def barlow_twins(za, zb, redundancy=0.0051, scale=1.0):
    """Barlow Twins (arXiv 2103.03230), standardized by batch norm with eps 1e-5, as in its code."""
    # scale is for LARS, which does not adapt steps of biases and norms: 0.024 in an early version
    # of the authors' code (later, these have a rate 40 times smaller), 0.048 or 0.1 in solo-learn.
    # scale (sum_j (1 - C_jj)^2 + redundancy sum_{i != j} C_ij^2),  C = K K'^T / N, K standardized
    N = len(za)
    diagonal, squares = diagonal_and_rest(standardize(za).T, standardize(zb).T)
    on_diagonal = (1 - diagonal / N).square().sum()
    return dict(invariance=scale * on_diagonal, redundancy=scale * redundancy * squares / N**2)


def coding_rate(z, eps):
    # R(K) = 1/2 logdet(I + D / (N eps^2) K K^T), by Sylvester's identity the same with K^T K
    N, D = z.shape
    matrix = D / (N * eps**2) * smaller_gram(z)
    return torch.logdet(matrix + torch.ones_like(matrix[0]).diag()) / 2


@criterion
def tcr(za, zb, invariance=1.0, eps=0.5):
    """Minus the total coding rate (arXiv 2201.10000) of embeddings of norm 1, and an invariance."""
    # invariance / N sum_i ||z_i - z'_i||^2 - (R(K) + R(K')) / (2N)
    za, zb = F.normalize(za), F.normalize(zb)
    rate = (coding_rate(za, eps) + coding_rate(zb, eps)) / (2 * len(za))
    return dict(invariance=invariance * mean_squared_distance(za, zb), repulsion=-rate)


# ---- Sample-contrastive criteria (Prop 3.1, 3.2) -------------------------------------------------


@criterion
def sample_contrastive(za, zb, invariance=25.0, repulsion=1.0):
    """L_c plus an invariance term, on dimensions of mean 0 and norm sqrt(N / D)."""
    return squared_contrast(L_c, za, zb, invariance, repulsion)


@criterion
def spectral(za, zb, radius=3.0):
    """Spectral contrastive loss (arXiv 2106.04156). Norms are clipped to radius, its sqrt(mu)."""
    # -2/N sum_i z_i . z'_i + 1 / (N (N - 1)) sum_{i != j} (z_i . z'_j)^2
    N = len(za)
    za, zb = (z * (radius / z.norm(dim=1, keepdim=True).clamp_min(radius)) for z in (za, zb))
    positives, squares = diagonal_and_rest(za, zb)
    return dict(invariance=-2 * positives.mean(), repulsion=squares / (N * (N - 1)))


def log_sum_exp(x, n_samples, temperature, similarity=torch.positive):
    """log sum_j exp(s(x_i . x_j) / tau) for each row i of x (n, m), over rows j of other samples.

    Row i belongs to sample i mod n_samples; by default, s is the identity. More products than BLOCK
    are computed in blocks of rows, and again in the backward pass, which torch.func cannot do.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    n, m = x.shape
    sample = torch.arange(n, device=x.device) % n_samples

    def of_rows(rows, sample_of_row):
        products = gram(x) if rows is x and n <= m else rows @ x.T  # n > m: gram is slower
        scores = similarity(products) / temperature
        # masked in place, unseen by autograd: as exp(-inf) = 0, no gradient comes to what is masked
        scores.detach().masked_fill_(sample_of_row[:, None] == sample, -math.inf)
        return scores.logsumexp(1)

    if n * n <= BLOCK:
        return of_rows(x, sample)
    height = max(1, BLOCK // n)
    blocks = zip(x.split(height), sample.split(height))
    return torch.cat([checkpoint(of_rows, *block, use_reentrant=False) for block in blocks])


def nt_xent(za, zb, temperature, negatives, similarity=torch.positive, dcl=False):
    """Pulls positives (z_i, z'_i) together, pushes negatives apart; averages over 2N anchors."""
    # mean over anchors i of -p_i / tau + log([exp(p_i / tau)] + sum_j exp(s(z_i . z_j) / tau)),
    # p_i = s(z_i . z'_i), j over the negatives of i; DCL leaves out the bracket
    if negatives not in ("both", "own"):
        raise ValueError(f"negatives must be 'both' or 'own', not {negatives!r}")
    views = [torch.cat((za, zb))] if negatives == "both" else [za, zb]
    repulsion = torch.cat([log_sum_exp(z, len(za), temperature, similarity) for z in views])
    positives = similarity((za * zb).sum(1)) / temperature  # (N,)
    if not dcl:
        repulsion = torch.logaddexp(repulsion, positives.repeat(2))
    return dict(invariance=-positives.mean(), repulsion=repulsion.mean())


@criterion
def simclr(za, zb, temperature=0.2, negatives="both"):
    """SimCLR (arXiv 2002.05709). Negatives: of "both" views, or the anchor's "own" (this paper)."""
    return nt_xent(F.normalize(za), F.normalize(zb), temperature, negatives)


@criterion
def simclr_sq(za, zb, temperature=0.2, negatives="both"):
    """SimCLR with all cosines squared, also that of the positive pair."""
    return nt_xent(F.normalize(za), F.normalize(zb), temperature, negatives, torch.square)


@criterion
def simclr_abs(za, zb, temperature=0.2, negatives="both"):
    """SimCLR with the absolute values of all cosines, also that of the positive pair."""
    return nt_xent(F.normalize(za), F.normalize(zb), temperature, negatives, torch.abs)


@criterion
def simclr_centered(za, zb, temperature=0.2, negatives="both"):
    """Variant A of table 1: dimensions of mean 0, then embeddings of norm 1."""
    return nt_xent(F.normalize(center(za)), F.normalize(center(zb)), temperature, negatives)


@criterion
def simclr_standardized(za, zb, temperature=0.2, negatives="both"):
    """Variant B of table 1, Eq 14: dimensions of mean 0 and norm sqrt(N / D)."""
    return nt_xent(normalize_dimensions(za), normalize_dimensions(zb), temperature, negatives)


@criterion
def dcl(za, zb, temperature=0.2, negatives="both"):
    """DCL (arXiv 2110.06848): SimCLR without the positive in the denominator. Can be negative."""
    return nt_xent(F.normalize(za), F.normalize(zb), temperature, negatives, dcl=True)


@criterion
def dcl_sq(za, zb, temperature=0.2, negatives="both"):
    """DCL with all cosines squared, also that of the positive pair."""
    return nt_xent(F.normalize(za), F.normalize(zb), temperature, negatives, torch.square, dcl=True)


@criterion
def dcl_abs(za, zb, temperature=0.2, negatives="both"):
    """DCL with the absolute values of all cosines, also that of the positive pair."""
    return nt_xent(F.normalize(za), F.normalize(zb), temperature, negatives, torch.abs, dcl=True)


# ---- Section 4: the chain, vicreg -> vicreg_exp -> vicreg_ctr -> simclr --------------------------


def v_and_c_exp(x, temperature):
    # c_exp = 1/n sum_i log sum_{j != i} exp(C_ij / tau)
    x = x / math.sqrt(x.shape[1] - 1)  # now C = X X^T
    return hinge((x * x).sum(1)), log_sum_exp(x, len(x), temperature).mean()


@criterion
def vicreg_exp(za, zb, invariance=25.0, variance=25.0, covariance=25.0, temperature=0.1):
    """VICReg --LogSumExp--> VICReg-exp, Eq 11: c's sum of squares becomes a log-sum-exp."""
    weights = invariance, variance, covariance
    return vicreg_terms(za, zb, lambda z: v_and_c_exp(z.T, temperature), *weights)


@criterion
def vicreg_ctr(za, zb, invariance=25.0, variance=25.0, covariance=25.0, temperature=0.2):
    """VICReg-exp --transpose--> VICReg-ctr, Eq 13: v and c_exp of K^T, with dimensions centered."""
    # v now raises norms to sqrt(D - 1); between embeddings of that norm, C_ij is the cosine
    weights = invariance, variance, covariance
    return vicreg_terms(za, zb, lambda z: v_and_c_exp(z, temperature), *weights)


CHAIN = ("vicreg", "vicreg-exp", "vicreg-ctr", "simclr")


@criterion
def chain(za, zb, t=1.5):
    """Interpolates between the chain's losses at their defaults: CHAIN[t] at t = 0, 1, 2, 3."""
    # sum_k max(0, 1 - |t - k|) loss_k,  loss_k that of CHAIN[k]
    if not 0 <= t <= 3:
        raise ValueError(f"t must be in [0, 3], not {t}")
    terms = {}
    for k, name in enumerate(CHAIN):
        if abs(t - k) < 1:
            for key, term in CRITERIA[name].terms(za, zb).items():
                terms[f"{name} {key}"] = (1 - abs(t - k)) * term
    return terms


# ---- Tools ---------------------------------------------------------------------------------------


def rankme(z):
    """Effective rank (arXiv 2210.02885) of z (N, D), best in float64; nan if z z^T overflows."""
    # exp(-sum_k p_k log p_k),  p_k = s_k / sum_l s_l + 1e-7,  s the singular values of z
    matrix = smaller_gram(z)
    if not matrix.isfinite().all():
        return z.new_tensor(math.nan)
    s = torch.linalg.eigvalsh(matrix).clamp_min(0).sqrt()
    p = s / s.sum().clamp_min(torch.finfo(s.dtype).tiny) + 1e-7
    return (-p * p.log()).sum().exp()


@torch.no_grad()
def diagnose(z):
    """Indicators of collapse of z (N, D), and both sides of theorem 3.3, as 0-d float64 tensors.

    negative_mean and _variance, of different samples' cosines, are ideally 0 and 1 / D (Prop 3.1).
    """
    z = z.cpu().double() if z.device.type == "mps" else z.double()  # MPS has no float64
    N, D = z.shape
    std, norms, u = z.std(0), z.norm(dim=1), F.normalize(z)
    # sum_{i != j} u_i . u_j = ||sum_i u_i||^2 - sum_i ||u_i||^2; the sum of their squares is L_c(u)
    mean = (u.sum(0).square().sum() - u.square().sum()) / (N * (N - 1))
    variance = L_c(u) / (N * (N - 1)) - mean**2
    found = dict(std_mean=std.mean(), std_min=std.min(), rankme=rankme(z))
    found.update(norm_mean=norms.mean(), norm_std=norms.std(), L_c=L_c(z), L_nc=L_nc(z))
    found.update(theorem_left=found["L_nc"] + norms4(z.T), theorem_right=found["L_c"] + norms4(z))
    return dict(found, negative_mean=mean, negative_variance=variance)


def gather(z):
    """Stacks the rows of all W processes by rank, (N / W, D) -> (N, D); without a group, returns z.

    All processes need equally many rows (drop_last=True). Each computes the loss of the whole
    batch; the stacked rows' first derivatives are summed over processes, since DDP divides by W.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return z
    z = z.contiguous()
    parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, z.detach())
    parts[dist.get_rank()] = z
    whole = torch.cat(parts)
    if whole.requires_grad:
        whole.register_hook(sum_over_processes)
    return whole


def sum_over_processes(gradient):
    total = gradient.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


if __name__ == "__main__":
    z = torch.randn(256, 128, dtype=torch.float64)
    print(f"L_nc {L_nc(z):.2f} + sum_j ||K_j,.||^4 {norms4(z.T):.2f} = {(z.T @ z).norm() ** 2:.2f}")
    print(f"L_c  {L_c(z):.2f} + sum_i ||K_.,i||^4 {norms4(z):.2f} = {(z @ z.T).norm() ** 2:.2f}")
