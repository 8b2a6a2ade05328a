"""The duality between contrastive and non-contrastive self-supervised learning, in one file.

Garrido, Chen, Bardes, Najman, LeCun, ICLR 2023, arXiv 2206.02574. The paper's K is (M, N), a column a sample.
Here rows are samples: z = K^T is (N, D), D = M; z z^T compares samples and z^T z compares dimensions.

    theorem      L_c  L_nc  norms4  lemma_3_4  corollary_3_4_1         Def 3.2, Thm 3.3, Lemma 3.4, Cor 3.4.1
    chain        vicreg -> vicreg_exp -> vicreg_ctr -> simclr; chain   Section 4, Eq 11-13
    contrastive  simclr[_sq, _abs]  dcl[_sq, _abs]  spectral           Prop 3.1, Prop 3.2
    variants     simclr_centered  simclr_standardized                  Table 1 (A and B), Eq 14
    dimensions   vicreg  vicreg_contrastive  barlow_twins  tcr         Prop 3.2, Eq 9-10
    the pair     sample_contrastive  dimension_contrastive             Def 3.2, trained as they stand

A criterion is a pure function f(za, zb, **hyperparameters) of two views (N, D). Its body returns its weighted
terms, `@criterion` makes it their sum: vicreg(za, zb) is the loss, vicreg.terms(za, zb) the dict to log.
"""
import functools, math
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CRITERIA = {}  # name -> criterion, filled by @criterion
CHAIN = ("vicreg", "vicreg-exp", "vicreg-ctr", "simclr")
BLOCK = 2**22  # entries of a log-sum-exp's matrix that are held at a time

def full_precision(function):
    """Runs function(tensors...) in float32 (in float64 if they are), whatever their type and autocast."""
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        args = [x.float() if torch.is_tensor(x) and x.dtype != torch.float64 else x for x in args]
        with torch.autocast(args[0].device.type, enabled=False):
            return function(*args, **kwargs)
    return wrapper

def criterion(terms):
    """Registers f(za, zb, ...) -> dict of weighted terms, as the criterion that is their sum.

    ValueError for views that differ in shape, are not 2-D, have N < 2 or D < 1. On a CPU, where looking waits
    for nothing, also for a loss that is not finite and for magnitudes above 1e15, whose squares overflow.
    """
    @functools.wraps(terms)
    def checked(za, zb, *args, **kwargs):
        if za.shape != zb.shape or za.ndim != 2 or len(za) < 2 or not za.numel():
            raise ValueError(f"expected views (N, D), N > 1, D > 0, got {tuple(za.shape)}, {tuple(zb.shape)}")
        return full_precision(terms)(za, zb, *args, **kwargs)
    @functools.wraps(terms)
    def loss(za, zb, *args, **kwargs):
        total = sum(checked(za, zb, *args, **kwargs).values())
        if total.device.type == "cpu":
            size = max(max(-low, high) for low, high in (z.detach().aminmax() for z in (za, zb)))
            if not (total.isfinite() and size <= 1e15):
                raise ValueError(f"{terms.__name__} is {total:g} for embeddings of magnitudes up to {size:g}")
        return total
    loss.terms = checked
    CRITERIA[terms.__name__.replace("_", "-")] = loss
    return loss

# --- Section 3: two criteria and a theorem ----------------------------------------------------------------
def with_gradient(value, gradient):
    """f(a) = value(a), with gradient(a, g) for the incoming g, leaner than the one autograd would find."""
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            ctx.save_for_backward(a)
            return value(a)
        backward = staticmethod(once_differentiable(lambda ctx, g: gradient(*ctx.saved_tensors, g)))
    return Function.apply

# A A^T, (n, m) -> (n, n), by one product, not two; the rows' ||a_i||^2, log sum_j exp(a_ij), (n, m) -> (n,)
gram = with_gradient(lambda a: a @ a.T, lambda a, g: torch.empty_like(g).copy_(g.T).add_(g) @ a)  # g^T + g
squared_norms = with_gradient(lambda a: (a * a).sum(1), lambda a, g: a * (2 * g)[:, None])
logsumexp = with_gradient(lambda a: a.logsumexp(1), lambda a, g: a.softmax(1).mul_(g[:, None]))

# sum_{i != j} (a_i . b_j)^2 over the rows of A and B, (n, m), by two routes; with A = B they are theorem 3.3.
def direct_route(a, b):  # ||A B^T - diag||_F^2
    c = gram(a) if a is b else a @ b.T
    return c.diagonal().clone(), c.fill_diagonal_(0).norm().square()

def dual_route(a, b):  # <A^T A, B^T B>_F - ||diag(A B^T)||^2
    g, diagonal = gram(a.T), squared_norms(a) if a is b else (a * b).sum(1)
    return diagonal, (g * (g if a is b else gram(b.T))).sum() - diagonal.square().sum()

def off_diagonal(a, b):
    """(all a_i . b_i, sum_{i != j} (a_i . b_j)^2) of rows, (n, m), at the cost min(n, m)^2 max(n, m)."""
    # The dual route's difference cancels only where few diagonal entries outweigh the rest. A B^T has rank m
    # or less, so ||A B^T||^2 >= tr(A B^T)^2 / m: for like entries (optimal) n / m >= 2 times the subtrahend.
    return (direct_route if len(a) < 2 * a.shape[1] else dual_route)(a, b)

@full_precision
def L_c(z):
    """Sample-contrastive criterion of z (N, D), Def 3.2: ||K^T K - diag||_F^2."""
    return off_diagonal(z, z)[1]

def L_nc(z):
    """Dimension-contrastive criterion of z (N, D), Def 3.2: ||K K^T - diag||_F^2."""
    return L_c(z.T)

@full_precision
def norms4(z):
    """sum_i ||K_.,i||^4 of z (N, D). Theorem 3.3: L_nc(z) + norms4(z.T) = L_c(z) + norms4(z)."""
    return squared_norms(z).square().sum()

def lemma_3_4(n, m, a=1.0):
    """Bounds of norms4(z.T) for n embeddings of norm a in m dimensions; n, m exchanged: the dual ones."""
    return n**2 / m * a**4, n**2 * a**4  # (N^2 / M) a^4 <= sum_j ||K_j,.||^4 <= N^2 a^4

def corollary_3_4_1(z):
    """Bounds of L_c(z) for embeddings of norm 1; with z.T, of L_nc(z) for dimensions of norm 1."""
    # L_nc - N + N^2 / M <= L_c <= L_nc - N + N^2
    return tuple(L_nc(z) - len(z) + bound for bound in lemma_3_4(*z.shape))

# --- The parts of all criteria ----------------------------------------------------------------------------
def center(z):
    """Dimensions of mean 0 over the batch, (N, D) -> (N, D)."""
    return z + -z.mean(0)  # the backward pass of z - z.mean(0) would negate all of the gradient

def normalize(z):
    """Embeddings of norm 1; zero stays zero."""
    return F.normalize(z, dim=1)

def standardize(z, eps=1e-5):
    """Centred dimensions of norm sqrt(N), that is of (biased) variance 1, eps added."""
    return F.batch_norm(z, None, None, training=True, eps=eps)

def spread(z):
    """Centred dimensions of norm sqrt(N / D) whatever their scale: embeddings of norm 1 on average."""
    return standardize(center(z), eps=1e-30) / math.sqrt(z.shape[1])

def hinge(variances, eps=1e-4):
    # v(K) = 1/d sum_j max(0, 1 - sqrt(Var_j + eps))
    return F.relu(1 - (variances + eps).sqrt()).mean()

# Of centred k = K, (d, N), each of these gives all Var_j = C(K)_jj and d times c(K); C(K) = K K^T / (N - 1).
def covariance_squares(k):
    # d c(K) = sum_{i != j} C(K)_ij^2
    diagonal, squares = off_diagonal(k, k)
    return diagonal / (k.shape[1] - 1), squares / (k.shape[1] - 1) ** 2

def covariance_contrastive(k):
    # d c(K) = (L_c + L_reg) / (N - 1)^2,  L_reg = sum_i ||K_.,i||^4 - sum_j ||K_j,.||^4
    return squared_norms(k) / (k.shape[1] - 1), (L_c(k.T) + norms4(k.T) - norms4(k)) / (k.shape[1] - 1) ** 2

def covariance_exp(k, temperature):
    # d c_exp(K) = sum_i log sum_{j != i} exp(C(K)_ij / tau)
    k = k / math.sqrt(k.shape[1] - 1)
    return squared_norms(k), log_sum_exp(k, temperature).sum()

def log_sum_exp(a, temperature, samples=None, similarity=lambda x: x):
    """log sum_j exp(s(a_i . a_j) / tau) of each row i of a (n, m) over the rows j of other samples, (n,).

    Rows i and i + samples are views of one sample (default: each row is a sample). An n x n matrix with more
    than BLOCK entries is only held in blocks of rows, which the backward pass makes anew.
    """
    n, samples = len(a), samples or len(a)
    if samples < 2 or not temperature > 0:
        raise ValueError(f"log-sum-exp of {samples} rows at temperature {temperature}: needs > 1 and > 0")
    def reduce(block, rows):
        scores = similarity(gram(a) if block is a else block @ a.T).div_(temperature)
        for own in range(0, n, samples):  # detached, as the softmax of -inf, which is the gradient, is 0
            scores.detach()[rows - rows[0], own + rows % samples] = -math.inf
        return logsumexp(scores)
    blocks, rows = (x.split(max(1, BLOCK // n)) for x in (a, torch.arange(n, device=a.device)))
    if len(blocks) == 1:
        return reduce(a, rows[0])
    return torch.cat([checkpoint(reduce, *block, use_reentrant=False) for block in zip(blocks, rows)])

def coding_rate(z, eps):
    # R(Z) = 1/2 logdet(I + D / (N eps^2) Z^T Z), the same of Z Z^T by Sylvester's identity
    (n, d), small = z.shape, z if len(z) < z.shape[1] else z.T
    eye = torch.eye(len(small), dtype=z.dtype, device=z.device)
    return torch.linalg.cholesky_ex(eye + d / (n * eps**2) * gram(small)).L.diagonal().log().sum()

# --- Section 4: the chain. Each arrow is one change -------------------------------------------------------
def _vicreg(za, zb, repulsion, invariance, variance, covariance, *temperature, transpose=False):
    # lambda / (N d) sum_i ||K_i - K'_i||^2 + mu / 2 (v(K) + v(K')) + nu (c(K) + c(K'))
    # The gradient of a function of C(K) has mean 0 over the samples: it need not pass through their mean.
    ks = [center(z) if transpose else (z - z.mean(0).detach()).T for z in (za, zb)]
    variances, repulsions = zip(*(repulsion(k, *temperature) for k in ks))
    return dict(invariance=invariance * F.mse_loss(za, zb),
                variance=variance / 2 * sum(map(hinge, variances)),
                covariance=covariance * sum(repulsions) / len(ks[0]))

@criterion
def vicreg(za, zb, invariance=25.0, variance=25.0, covariance=1.0):
    """VICReg (arXiv 2105.04906) as in its code: the mean of the views' variance terms, the sum of their c."""
    return _vicreg(za, zb, covariance_squares, invariance, variance, covariance)

@criterion
def vicreg_contrastive(za, zb, invariance=25.0, variance=25.0, covariance=1.0):
    """VICReg computed as a contrastive criterion, Eq 10: same value and gradient; N >> D cancels digits."""
    return _vicreg(za, zb, covariance_contrastive, invariance, variance, covariance)

@criterion
def vicreg_exp(za, zb, invariance=25.0, variance=25.0, covariance=25.0, temperature=0.1):
    """VICReg --LogSumExp--> VICReg-exp, Eq 11-12."""
    return _vicreg(za, zb, covariance_exp, invariance, variance, covariance, temperature)

@criterion
def vicreg_ctr(za, zb, invariance=25.0, variance=25.0, covariance=25.0, temperature=0.1):
    """VICReg-exp --transpose--> VICReg-ctr, Eq 13, of centred dimensions: v and c_exp of K^T.

    Embedding i's variance is ||z_i||^2 / (D - 1), so at the hinge C(K^T) holds cosines."""
    return _vicreg(za, zb, covariance_exp, invariance, variance, covariance, temperature, transpose=True)

def contrastive(name, doc, prepare=normalize, similarity=lambda x: x, decoupled=False):
    """The criterion, registered, of embeddings made ready by `prepare`, that contrasts s(x_i . x_j)."""
    def terms(za, zb, temperature=0.2, negatives="both"):
        # -1/N sum_i s_ii'/tau + 1/2N sum_i log([exp(s_ii'/tau)] + sum_j exp(s_ij/tau)), s_ij = s(x_i . x_j)
        za, zb, n = prepare(za), prepare(zb), len(za)
        if negatives not in ("both", "own"):
            raise ValueError(f"negatives are 'both' views' or the anchor's 'own' view's, not {negatives!r}")
        views = [torch.cat((za, zb))] if negatives == "both" else [za, zb]
        repulsion = torch.cat([log_sum_exp(z, temperature, n, similarity) for z in views])  # (2N,)
        positives = similarity((za * zb).sum(1)) / temperature  # (N,)
        if not decoupled:
            repulsion = torch.logaddexp(repulsion, positives.repeat(2))
        return dict(invariance=-positives.mean(), repulsion=repulsion.mean())
    terms.__name__, terms.__qualname__, terms.__doc__ = name, name, doc
    return criterion(terms)

simclr = contrastive("simclr", """VICReg-ctr --negative pair sampling--> SimCLR (NT-Xent, arXiv 2002.05709).
    Mean of 2N anchors; negatives: "both" views' 2(N - 1), original, or the "own" view's N - 1, paper.""")

@criterion
def chain(za, zb, t=1.5):
    """A continuous path through CHAIN, t in [0, 3]: between neighbours, their convex combination."""
    # (1 - w) L_k + w L_{k+1},  k = floor(t), w = t - k
    if not 0 <= t <= 3:
        raise ValueError(f"t must be in [0, 3], not {t}")
    k = min(int(t), 2)
    return {f"{name} {key}": w * term for name, w in ((CHAIN[k], k + 1 - t), (CHAIN[k + 1], t - k)) if w
            for key, term in CRITERIA[name].terms(za, zb).items()}

# --- Their relatives: sample-contrastive (Prop 3.1, 3.2) --------------------------------------------------
simclr_sq = contrastive("simclr_sq", "SimCLR of squared cosines, positives too.", similarity=torch.square)
simclr_abs = contrastive("simclr_abs", "SimCLR of absolute cosines, positives too.", similarity=torch.abs)
simclr_centered = contrastive("simclr_centered", "Variant A: SimCLR of centred dimensions, then norm 1.",
                              prepare=lambda z: normalize(center(z)))
simclr_standardized = contrastive("simclr_standardized", "Variant B (Eq 14), of spread(z).", prepare=spread)
dcl = contrastive("dcl", "DCL (arXiv 2110.06848): no positive in the log; may be negative.", decoupled=True)
dcl_sq = contrastive("dcl_sq", "DCL of squared cosines.", similarity=torch.square, decoupled=True)
dcl_abs = contrastive("dcl_abs", "DCL of absolute cosines.", similarity=torch.abs, decoupled=True)

@criterion
def spectral(za, zb, radius=3.0):
    """Spectral contrastive loss (arXiv 2106.04156); embeddings beyond sqrt(mu) = radius are put there."""
    # -2/N sum_i x_i . x'_i + 1/(N (N - 1)) sum_{i != j} (x_i . x'_j)^2
    za, zb = (z * (radius / z.norm(dim=1, keepdim=True).clamp_min(radius)) for z in (za, zb))
    n, (positives, squares) = len(za), off_diagonal(za, zb)
    return dict(invariance=-2 * positives.mean(), repulsion=squares / n / (n - 1))

def _pair(za, zb, L, invariance, repulsion):
    # lambda / N sum_i ||x_i - x'_i||^2 + nu / 2N (L(K) + L(K'))
    return dict(invariance=invariance * za.shape[1] * F.mse_loss(za, zb),
                repulsion=repulsion / 2 / len(za) * (L(za) + L(zb)))

@criterion
def sample_contrastive(za, zb, invariance=25.0, repulsion=1.0):
    """An invariance term and L_c of centred dimensions of norm sqrt(N / D)."""
    return _pair(spread(za), spread(zb), L_c, invariance, repulsion)

# --- and dimension-contrastive ----------------------------------------------------------------------------
@criterion
def dimension_contrastive(za, zb, invariance=25.0, repulsion=1.0):
    """The same with L_nc, of the same embeddings; of norm 1 alone they could collapse onto one dimension."""
    return _pair(spread(za), spread(zb), L_nc, invariance, repulsion)

@criterion
def barlow_twins(za, zb, redundancy=0.0051):
    """Barlow Twins (arXiv 2103.03230) as in its code: sums, biased variance + 1e-5."""
    # sum_j (1 - C_jj)^2 + lambda sum_{i != j} C_ij^2,  C = K K'^T / N of standardised dimensions
    n, (ka, kb) = len(za), (standardize(z).T for z in (za, zb))
    diagonal, squares = off_diagonal(ka, kb)
    return dict(invariance=(1 - diagonal / n).square().sum(), redundancy=redundancy / n**2 * squares)

@criterion
def tcr(za, zb, invariance=1.0, eps=0.5):
    """Total coding rate (arXiv 2201.10000) of embeddings of norm 1, per sample, maximised."""
    # lambda / N sum_i ||x_i - x'_i||^2 - 1/2N (R(Z) + R(Z'))
    return _pair(normalize(za), normalize(zb), lambda z: -coding_rate(z, eps), invariance, repulsion=1.0)

# --- To watch and to distribute ---------------------------------------------------------------------------
@torch.no_grad()
def diagnose(z):
    """What shows a collapse of z (N, D), and both sides of theorem 3.3, as 0-d float64 tensors.

    rankme: exp of the singular values' entropy (arXiv 2210.02885); negative_mean and negative_variance of the
    cosines of different samples: 0 and 1 / D by Prop 3.1.
    """
    z = z.to("cpu" if z.device.type == "mps" else z.device).double()
    (n, d), std, norm = z.shape, z.std(0), z.norm(dim=1)
    spectrum = torch.linalg.eigvalsh(gram(z if n < d else z.T)).clamp_min(0).sqrt()
    p = spectrum / spectrum.sum().clamp_min(1e-300) + 1e-7
    cosines, pairs = gram(normalize(z)).fill_diagonal_(0), n * (n - 1)
    mean = cosines.sum() / pairs
    return dict(std_mean=std.mean(), std_min=std.min(), norm_mean=norm.mean(), norm_std=norm.std(),
                rankme=(-(p * p.log()).sum()).exp(), L_c=L_c(z), L_nc=L_nc(z),
                theorem_left=L_nc(z) + norms4(z.T), theorem_right=L_c(z) + norms4(z),
                negative_mean=mean, negative_variance=cosines.square().sum() / pairs - mean**2)

def _all_rows(z):
    parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, z.contiguous())
    return torch.cat(parts)
def _own_rows(z, g):  # g is of the whole batch's loss, which each process has; DDP's mean takes the W away
    return g.chunk(dist.get_world_size())[dist.get_rank()] * dist.get_world_size()
_gather = with_gradient(_all_rows, _own_rows)

def gather(z):
    """All processes' rows in order of rank, (N / W, D) -> (N, D); z itself without a process group.

    As each process computes the whole batch's loss, DDP's averaging gives the gradient of one process.
    """
    return _gather(z) if dist.is_available() and dist.is_initialized() else z

if __name__ == "__main__":
    torch.manual_seed(0)
    print("theorem 3.3, random embeddings; corollary 3.4.1, the same of norm 1\n    N     D"
          "  L_nc + sum_j ||K_j||^4  L_c + sum_i ||K_i||^4  difference     lower    <= L_c <=   upper")
    for n, d in ((256, 64), (256, 256), (256, 2048)):
        z = torch.randn(n, d, dtype=torch.float64)
        left, right = (direct_route(k, k)[1] + norms4(k) for k in (z.T, z))
        (low, high), L = corollary_3_4_1(normalize(z)), L_c(normalize(z))
        print(f"{n:5} {d:5} {left:23.4f} {right:22.4f} {left - right:11.1e} {low:9.1f} {L:12.1f} {high:9.1f}")
    za, noise = torch.randn(2, 256, 128)
    print("\nthe chain, two views (256, 128)")
    for t in (0, 0.5, 1, 1.5, 2, 2.5, 3):
        terms = [f"{value:.3f} ({name})" for name, value in chain.terms(za, za + 0.5 * noise, t).items()]
        print(f"t = {t:<4}{chain(za, za + 0.5 * noise, t):8.3f} = {' + '.join(terms)}")
