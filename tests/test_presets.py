"""What a preset's pictures show, where a test can tell."""

from __future__ import annotations

from pathlib import Path

import pytest
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from vae_ray import Experiment, TrainedVAE, train

SURE = 0.8


@pytest.mark.filterwarnings("ignore:The `probability` parameter:FutureWarning")
def test_samples_of_the_digits_preset_are_digits(tmp_path: Path) -> None:
    """By a classifier that is sure of 98 % of the real ones."""
    images, labels = load_digits(return_X_y=True)
    classifier = SVC(probability=True, random_state=0).fit(images / 16, labels)
    assert (classifier.predict_proba(images / 16).max(1) >= SURE).mean() > 0.97
    result = train(Experiment.preset("digits").with_overrides({"workers.num": 0, "run.storage": str(tmp_path)}))
    samples = TrainedVAE.load(result.run_dir).generate(1000).flatten(1).numpy()
    probabilities = classifier.predict_proba(samples)
    assert (probabilities.max(1) >= SURE).mean() >= 0.9
    assert set(probabilities.argmax(1)) == set(range(10))
