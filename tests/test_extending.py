"""docs/extending.md: every example is run as it is printed; docs/configuration.md is what the fields say."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vae_ray import Experiment, TrainedVAE, UserError, train
from vae_ray.config.reference import reference

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "extending.md").read_text(encoding="utf-8")
EXAMPLES = {
    source.partition(".py")[0].removeprefix("# "): source
    for source in re.findall(
        r"^```python\n(# my_\w+\.py\n.*?)^```", (DOCS / "extending.md").read_text(), flags=re.M | re.S
    )
}
CHOICES = {
    "my_nets": {"model.network": "my_nets:tiny", "model.network.width": "32"},
    "my_likelihoods": {"likelihood": "my_likelihoods:Laplace", "likelihood.scale": "0.2"},
    "my_priors": {"model.prior": "my_priors:Scaled"},
    "my_objectives": {"objective": "my_objectives:FreeBits", "objective.nats": "2"},
    "my_data": {"data.source": "my_data:noise", "data.count": "2000", "data.num_validation": 20},
    "my_callbacks": {"run.callbacks": "my_callbacks:Log"},
}


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's modules in the working directory, imported afresh."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name, source in EXAMPLES.items():
        Path(f"{name}.py").write_text(source)
    yield
    for name in EXAMPLES:
        sys.modules.pop(name, None)


def test_the_page_has_an_example_of_each_kind() -> None:
    assert EXAMPLES.keys() == CHOICES.keys()
    for name, source in EXAMPLES.items():
        lines = [line for line in source.splitlines() if line and not line.startswith(("import", "from", "#"))]
        assert len(lines) <= 15, name


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("name", sorted(CHOICES))
def test_an_example_trains_and_its_checkpoint_needs_trust(name: str, quick: Experiment) -> None:
    result = train(quick.with_overrides({**CHOICES[name], "training.epochs": 2}))
    assert result.epochs == 2
    with pytest.raises(UserError, match="--trust-code"):
        TrainedVAE.load(result.run_dir)
    vae = TrainedVAE.load(result.run_dir, trust_code=True)
    metrics = vae.evaluate("test")
    assert metrics["test/nelbo"] == pytest.approx(result.metrics["test/nelbo"], rel=1e-5)
    if name == "my_callbacks":
        assert len((Path(result.run_dir) / "log.jsonl").read_text().splitlines()) == 2


@pytest.mark.usefixtures("modules")
def test_all_examples_work_together(quick: Experiment) -> None:
    overrides = {key: value for choices in CHOICES.values() for key, value in choices.items()}
    result = train(quick.with_overrides({**overrides, "training.epochs": 1}))
    assert TrainedVAE.load(result.run_dir, trust_code=True).image_shape == (3, 8, 8)


def test_the_configuration_page_is_what_the_fields_say() -> None:
    assert (DOCS / "configuration.md").read_text() == reference(), "run python -m vae_ray.config.reference"
