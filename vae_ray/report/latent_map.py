"""Maps of the latent space: where codes of images lie, in two dimensions."""

from __future__ import annotations

import importlib.util
import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

PERPLEXITY = 30.0
"""Of t-SNE: about how many neighbours of a code count (van der Maaten & Hinton 2008: 5 to 50)."""
PCA_DIMENSIONS = 50
"""To which codes are reduced before t-SNE, as in the paper."""


UMAP_NEIGHBOURS = 15


class LatentMap(NamedTuple):
    """One map."""

    title: str
    axes: tuple[str, str]
    positions: NDArray[np.float64]
    """`(N, 2)`."""


def latent_maps(codes: NDArray[np.float64]) -> list[LatentMap]:
    """PCA, t-SNE (scikit-learn) and, where umap-learn is installed, UMAP of codes `(N, latent_dim)`.

    Two dimensions are drawn as they are, one against its rank; no map if the codes do not differ. t-SNE and UMAP keep
    neighbours; sizes of clusters and distances between them say nothing. PCA is linear: distances are right as far as
    the two components hold the variance.
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
    embeddings = {"t-SNE": tsne.fit_transform(components)}
    if importlib.util.find_spec("umap") and num > UMAP_NEIGHBOURS:
        embeddings["UMAP"] = _umap(components)
    return [
        LatentMap("PCA", (shares[0], shares[1]), components[:, :2]),
        *(LatentMap(name, (f"{name} 1", f"{name} 2"), each.astype(np.float64)) for name, each in embeddings.items()),
    ]


def _umap(components: NDArray[np.float64]) -> NDArray[np.float32]:
    """McInnes et al. 2018 (arXiv:1802.03426), with the library's settings; in one thread, so that its seed decides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TensorFlow is not installed
        import umap  # takes seconds

    found: NDArray[np.float32] = umap.UMAP(n_neighbors=UMAP_NEIGHBOURS, random_state=0, n_jobs=1).fit_transform(
        components
    )
    return found
