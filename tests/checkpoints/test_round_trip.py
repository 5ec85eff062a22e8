"""A checkpoint comes back to the bit."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.checkpoints.written import EXPERIMENT, SHAPE, load, save, state_after, update
from vae_ray import UserError
from vae_ray.checkpoints.loading import AVERAGED, MANIFEST, TRAINING_STATE, WEIGHTS, read_checkpoint
from vae_ray.checkpoints.loading import EXPERIMENT as EXPERIMENT_FILE

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def of_dtype(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Random bytes as that dtype: NaNs with payloads, infinities, negative zeros."""
    size = torch.empty(shape, dtype=dtype).nbytes
    random = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), generator=torch.Generator().manual_seed(1))
    return random.to(torch.uint8).view(dtype).view(shape)


@pytest.mark.parametrize("shape", [(3, 5), (), (1,), (0, 4)], ids=str)
@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
def test_a_tensor_of_every_dtype_comes_back_to_the_bit(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    given = {"x": of_dtype(dtype, shape)}
    checkpoint = save(tmp_path, weights=given, averaged=given)
    for averaged in (False, True):
        tensor = read_checkpoint(checkpoint.path).weights(given, averaged=averaged)["x"]
        assert (tensor.dtype, tensor.shape) == (dtype, shape)
        assert bits(tensor) == bits(given["x"])


def test_tensors_that_share_memory_or_are_not_contiguous_come_back(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    given = {"tied": base, "also": base, "column": base[:, 2], "tail": base[2:], "turned": base.T}
    given["repeated"] = torch.ones(1).expand(3, 3)
    found = read_checkpoint(save(tmp_path, weights=given).path).weights(given)
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], given[name]) for name in given)


def test_buffers_and_tied_weights_of_a_module_come_back(tmp_path: Path) -> None:
    def module() -> torch.nn.Sequential:
        layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))
        layers[2].weight = layers[0].weight
        layers.register_buffer("mask", torch.tensor([True, False, True]))
        return layers

    trained, fresh = module(), module()
    trained(torch.rand(8, 4))
    fresh.load_state_dict(
        read_checkpoint(save(tmp_path, weights=trained.state_dict()).path).weights(fresh.state_dict())
    )
    assert fresh[2].weight is fresh[0].weight
    assert int(fresh.state_dict()["1.num_batches_tracked"]) == 1
    assert all(bits(fresh.state_dict()[name]) == bits(tensor) for name, tensor in trained.state_dict().items())


def test_weights_optimizer_and_the_updates_that_follow_are_equal_to_the_bit(tmp_path: Path) -> None:
    state = state_after(3)
    restored = load(save(tmp_path, state=state).path)
    for again in range(3):  # as restored, and after more updates by Adam, which depend on its moments
        pairs = zip(state.model.parameters(), restored.model.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
        update(state, seed=10 + again)
        update(restored, seed=10 + again)


def test_experiment_shape_metrics_and_scalars_come_back(tmp_path: Path) -> None:
    scalars = {"lr_factor": 0.1 + 0.2, "num_nonfinite": 2, "best_value": None, "name": "é"}
    written = save(tmp_path, epoch=7, score=1 / 3, scalars=scalars)
    found = read_checkpoint(tmp_path / "epoch=0007")
    assert found == written
    assert found.experiment() == EXPERIMENT
    assert (found.epoch, found.step, found.position, found.image_shape) == (7, None, (7, 0), SHAPE)
    assert (found.score, found.scalars) == (1 / 3, scalars)


def test_progress_inside_an_epoch_comes_back_to_the_bit(tmp_path: Path) -> None:
    state = state_after(2)
    state.term_sums = torch.rand(3, 4, dtype=torch.float64)
    state.progress.lr_factor, state.progress.num_nonfinite, state.progress.best_value = 0.1, 2, 1 / 3
    path = save(tmp_path, epoch=8, step=412, state=state).path
    assert path.name == "epoch=0008-step=000412"
    found, restored = read_checkpoint(path), load(path)
    assert (found.epoch, found.step, found.epochs_done, found.position) == (8, 412, 7, (7, 412))
    assert restored.progress == state.progress
    assert restored.term_sums is not None
    assert torch.equal(restored.term_sums, state.term_sums)


def test_a_checkpoint_has_averaged_weights_only_if_they_were_given(tmp_path: Path) -> None:
    files = {MANIFEST, EXPERIMENT_FILE, WEIGHTS, TRAINING_STATE}
    without = save(tmp_path, epoch=1)
    assert {file.name for file in without.path.iterdir()} == files
    with pytest.raises(UserError, match="has no averaged weights"):
        without.weights({}, averaged=True)
    averaged = save(tmp_path, epoch=2, averaged=state_after(0).model.state_dict())
    assert {file.name for file in averaged.path.iterdir()} == {*files, AVERAGED}


def test_a_checkpoint_in_memory_needs_no_directory(tmp_path: Path) -> None:
    checkpoint = save(tmp_path).in_memory()
    expected = state_after(2).model.state_dict()
    checkpoint.path.rename(tmp_path / "elsewhere")
    assert checkpoint.experiment() == EXPERIMENT
    assert all(torch.equal(tensor, expected[name]) for name, tensor in checkpoint.weights(expected).items())
