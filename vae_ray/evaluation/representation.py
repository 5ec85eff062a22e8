"""What codes say about labels: the accuracy of simple classifiers on them, beside the same on a PCA of the pixels.

Codes are `(N, d)`, labels whole numbers `(N,)`, those below 0 (no label) left out. Fitted on the training split,
accuracy on the test split. Without the baseline the numbers say little: ten principal components tell most of MNIST's
digits apart.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vae_ray.errors import UserError
from vae_ray.evaluation.observations import LABEL, Arrays
from vae_ray.evaluation.result import Result

NUM_NEIGHBOURS = 5
MOST_ITERATIONS = 1000


class Labelled(NamedTuple):
    """Codes of one split, or pixels, with labels."""

    codes: NDArray[np.floating]
    """`(N, d)`."""
    labels: NDArray[np.integer]
    """`(N,)`."""


def accuracies(train: Arrays, test: Arrays) -> Result:
    """Both accuracies for each label of both splits, by codes and by as many principal components of the pixels.

    Of a label with fewer than two classes there is a warning instead.

    Args:
        train: `codes` `(N, d)`, `small_pixels` `(N, P)` and `label:NAME` `(N,)` of training images.
        test: the same of those that are evaluated.
    """
    both = (train, test)
    pca = principal_components(train["small_pixels"], test["small_pixels"], num=train["codes"].shape[1])
    spaces = {"": [split["codes"] for split in both], ", pca of pixels": pca}
    values, errors, warnings = {}, {}, []
    for key in (key for key in train if key.startswith(LABEL)):
        label = key.removeprefix(LABEL)
        for suffix, codes in spaces.items():
            pair = [Labelled(each, split[key]) for each, split in zip(codes, both, strict=True)]
            try:
                found = {"linear_probe": linear_probe_accuracy(*pair), "neighbours": neighbour_accuracy(*pair)}
            except UserError as error:
                warnings.append(f"{label}: {error}")
                break
            num = int((test[key] >= 0).sum())
            named = {f"{name}[{label}{suffix}]": accuracy for name, accuracy in found.items()}
            values.update(named)
            errors.update({name: math.sqrt(each * (1 - each) / num) for name, each in named.items()})
    return Result(values, errors, warnings=tuple(warnings))


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
            f"labels of {num_classes} classes in the training images and {len(test.labels)} labels in the others, "
            "a classifier needs at least 2 and 1"
        )
    classifier.fit(train.codes, train.labels)  # type: ignore[attr-defined]
    return float((classifier.predict(test.codes) == test.labels).mean())  # type: ignore[attr-defined]


def _with_labels(split: Labelled) -> Labelled:
    has_label = split.labels >= 0
    return Labelled(split.codes[has_label], split.labels[has_label])
