"""Maps of the latent space: where codes of images lie, in two dimensions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

PERPLEXITY = 30.0
"""Of t-SNE: about how many neighbours of a code count (van der Maaten & Hinton 2008: 5 to 50)."""
PCA_DIMENSIONS = 50
"""To which codes are reduced before t-SNE, as in the paper."""


class LatentMap(NamedTuple):
    """One map."""

    title: str
    axes: tuple[str, str]
    positions: NDArray[np.float64]
    """`(N, 2)`."""


def latent_maps(codes: NDArray[np.float64]) -> list[LatentMap]:
    """PCA and t-SNE (scikit-learn) of codes `(N, latent_dim)`; two dimensions as they are, one against its rank.

    None if the codes do not differ. t-SNE keeps neighbours; its distances between clusters, and their sizes, say
    nothing. PCA is linear: distances are right as far as the two components hold the variance.
    """
    num, dimensions = codes.shape
    if num < 3 or not np.isfinite(codes).all() or not codes.std(axis=0).max() > 0:
        return []
    if dimensions == 1:
        ranks = codes[:, 0].argsort(kind="stable").argsort(kind="stable").astype(np.float64)
        return [LatentMap("The latent dimension", ("z[0]", "rank"), np.stack([codes[:, 0], ranks], axis=1))]
    if dimensions == 2:
        return [LatentMap("The two latent dimensions", ("z[0]", "z[1]"), codes)]
    pca = PCA(min(PCA_DIMENSIONS, num, dimensions), random_state=0)
    components = pca.fit_transform(codes)
    shares = [f"component {n + 1} ({100 * pca.explained_variance_ratio_[n]:.0f} % of the variance)" for n in range(2)]
    tsne = TSNE(perplexity=min(PERPLEXITY, (num - 1) / 3), init="pca", random_state=0)
    embedding = tsne.fit_transform(components).astype(np.float64)
    return [
        LatentMap("PCA", (shares[0], shares[1]), components[:, :2]),
        LatentMap("t-SNE", ("t-SNE 1", "t-SNE 2"), embedding),
    ]
