"""The first singular triples of a large matrix, many times faster than its full SVD."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Triples = tuple[Float[Tensor, "out r"], Float[Tensor, " r"], Float[Tensor, "r rest"]]
"""U, S and Vᵀ."""

EXACT_UP_TO = 512
"""The smaller side of the largest matrix whose full SVD is taken at once: it takes 0.1 s."""

OVERSAMPLING = 8
"""Columns of a block beyond r."""

FEWEST_STEPS = 8
"""Steps that a basis of half the smaller side must leave room for: most spectra take as many."""

MAX_ANGLE = 5e-4
"""The bound on the principal angles to the exact triples, in radians, at which iterating ends."""


def first_triples(W: Float[Tensor, "out rest"], r: int, generator: torch.Generator) -> Triples:
    """The first r singular triples of W.

    Of a small matrix they are those of its SVD, and so are they where the rth and the next singular
    value are too close to be told apart by iterating. Of others the principal angles to the exact
    ones are at most MAX_ANGLE. `generator` draws where the iteration starts.
    """
    triples = None
    if min(W.shape) > EXACT_UP_TO:
        is_tall = W.shape[0] > W.shape[1]
        triples = _by_block_krylov(W.mT if is_tall else W, r, generator)
        if triples is not None and is_tall:
            U, S, Vh = triples
            triples = Vh.mT, S, U.mT
    if triples is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        triples = U[:, :r], S[:r], Vh[:r]
    return triples


# For W of 896 × 4608 and r = 8, a block has 16 columns. Step by step the basis Q grows by the part
# of W Wᵀ Q's newest block that it does not hold yet: 16, 32, 48, … columns. Each step costs two
# products of W with a block. The best triples within the basis are those of Qᵀ W, from the
# eigenvectors of the small matrix Qᵀ W Wᵀ Q. How far W Wᵀ maps them out of the basis is known from
# the newest block, and bounds their angle to the exact ones (Davis and Kahan 1970). All blocks are
# kept, where the usual subspace iteration keeps the newest: it would take the square of the steps.
def _by_block_krylov(W: Float[Tensor, "m n"], r: int, generator: torch.Generator) -> Triples | None:
    """The first r triples of W (m ≤ n) by a randomized block Krylov method (Musco & Musco 2015).

    None where they do not settle in a basis of m/2 columns, beyond which the SVD is as fast.
    """
    (m, n), size = W.shape, r + OVERSAMPLING
    if FEWEST_STEPS * size > m // 2:
        return None
    start = torch.randn(n, size, generator=generator, dtype=torch.float32)
    block = torch.linalg.qr(W @ start.to(W)).Q  # (m, size)
    Q, WtQ = block[:, :0], W.new_empty(n, 0)  # (m, k) and (n, k): k columns so far
    gram = torch.zeros(0, 0, dtype=torch.float64, device=W.device)
    next_check = 0.0
    while Q.shape[1] + size <= m // 2:
        Q, WtQ = torch.cat([Q, block], 1), torch.cat([WtQ, W.mT @ block], 1)
        rows = (WtQ[:, -size:].mT @ WtQ).double()  # (size, k)
        gram = torch.cat([F.pad(gram, (0, size)), rows])  # (k, k), with its lower half alone
        block, R = W @ WtQ[:, -size:], torch.eye(size, dtype=torch.float64, device=W.device)
        for _ in range(2):  # once more, since rounding leaves parts of a small remainder within Q
            block, T = torch.linalg.qr(block - Q @ (Q.mT @ block))
            R = T.double() @ R
        k = Q.shape[1]
        if k < next_check and k + size <= m // 2:
            continue
        next_check = 1.2 * k  # not in each step: with many columns eigh takes as long as the step
        values, X = (t.flip(-1) for t in torch.linalg.eigh(gram))  # the largest first
        outside = torch.linalg.matrix_norm(R @ X[-size:, :r])  # of W Wᵀ U, beyond the basis
        if outside < MAX_ANGLE * (values[r - 1] - values[r]):
            S, X = values[:r].sqrt().to(W), X[:, :r].to(W)
            return Q @ X, S, (WtQ @ X / S).mT
    return None
