"""What codes say about labels: the accuracy of simple classifiers on them, beside the same on a PCA of the pixels.

Codes are `(N, d)`, labels whole numbers `(N,)`, those below 0 (no label) left out. Fitted on the training split,
accuracy on the test split. Without the baseline the numbers say little: ten principal components tell most of MNIST's
digits apart.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vae_ray.errors import UserError

NUM_NEIGHBOURS = 5
MOST_ITERATIONS = 1000


class Labelled(NamedTuple):
    """Codes of one split, or pixels, with labels."""

    codes: NDArray[np.floating]
    """`(N, d)`."""
    labels: NDArray[np.integer]
    """`(N,)`."""


def representation_accuracies(
    train: Labelled, test: Labelled, train_pixels: NDArray[np.floating], test_pixels: NDArray[np.floating]
) -> dict[str, float]:
    """Both accuracies, of the codes and of as many principal components of the pixels `(N, C * H * W)`, by name.

    Raises `UserError` if the labels are of fewer than two classes.
    """
    pca = principal_components(train_pixels, test_pixels, num=train.codes.shape[1])
    baseline = [split._replace(codes=codes) for split, codes in zip((train, test), pca, strict=True)]
    return {
        "linear-probe": linear_probe_accuracy(train, test),
        "linear-probe[pca of pixels]": linear_probe_accuracy(*baseline),
        f"knn[k={NUM_NEIGHBOURS}]": neighbour_accuracy(train, test),
        f"knn[k={NUM_NEIGHBOURS}, pca of pixels]": neighbour_accuracy(*baseline),
    }


def linear_probe_accuracy(train: Labelled, test: Labelled) -> float:
    """The share of test images whose label a multinomial logistic regression on the codes names; chance to 1.

    Codes are standardised by mean and standard deviation of the training codes (a constant dimension becomes 0). The
    weights W minimise sum_i -log p(label_i | code_i) + |W|² / 2: a convex problem with one solution; by L-BFGS.

    Good for: whether labels can be read off the code linearly. Misleads: more dimensions are never worse, so compare at
    one size; standardisation lifts dimensions that hold next to nothing; what is not linear is not seen.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = LogisticRegression(C=1.0, max_iter=MOST_ITERATIONS)
    return _accuracy(make_pipeline(StandardScaler(), probe), train, test)


def neighbour_accuracy(train: Labelled, test: Labelled, *, k: int = NUM_NEIGHBOURS) -> float:
    """The share of test images whose label most of the k nearest training codes have; chance to 1.

    Euclidean distance between codes as they are, unlike in the probe, so that a dimension counts by its spread; of
    classes with equally many neighbours the smallest label.

    Good for: whether images of a class lie together, in whatever shape. Misleads: the scale of dimensions matters, and
    in many dimensions distances say less.
    """
    from sklearn.neighbors import KNeighborsClassifier

    return _accuracy(KNeighborsClassifier(n_neighbors=k, algorithm="brute"), train, test)


def principal_components(
    train: NDArray[np.floating], test: NDArray[np.floating], *, num: int
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Coordinates of both splits along the first `num` principal components of `train`, centred by its mean.

    As many as there are, where `num` is more. Exact for up to 1,000 pixels; above, a randomised SVD with a fixed seed
    (Halko et al. 2011), which is about as good.
    """
    from sklearn.decomposition import PCA

    pca = PCA(min(num, *train.shape), random_state=0).fit(train)
    return pca.transform(train), pca.transform(test)


def _accuracy(classifier: object, train: Labelled, test: Labelled) -> float:
    train, test = _with_labels(train), _with_labels(test)
    num_classes = len(np.unique(train.labels))
    if num_classes < 2 or not len(test.labels):
        raise UserError(
            f"representation: got labels of {num_classes} classes in train and {len(test.labels)} labels in test, "
            "should be at least 2 and 1; choose other metrics"
        )
    classifier.fit(train.codes, train.labels)  # type: ignore[attr-defined]
    return float((classifier.predict(test.codes) == test.labels).mean())  # type: ignore[attr-defined]


def _with_labels(split: Labelled) -> Labelled:
    has_label = split.labels >= 0
    return Labelled(split.codes[has_label], split.labels[has_label])
