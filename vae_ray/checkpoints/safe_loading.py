"""A checkpoint's bytes become tensors: only what we write ourselves, and only where it fits the model.

Between the checksums and the model. A checksum says that a file is what its writer wrote, not that the writer meant
well; so headers are compared with the model before anything is allocated for what they say, and a pickle may name the
few functions that rebuild tensors and nothing else. Everything raises `ValueError` with what is wrong.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.optim import Optimizer

from vae_ray.storage.reading import parse_json, shown

HEADER_BYTES = 1 << 20
"""More than the header of any network here needs."""
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16"}
PICKLED_NAMES = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch FloatStorage",
    "torch DoubleStorage",
    "torch BFloat16Storage",
    "torch LongStorage",
}
"""What a training state's pickle may refer to. `weights_only` lets more pass, for one `bytearray(10**12)`."""
NAMING_OPCODES = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}


def weights_from(content: bytes, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a safetensors file that has exactly the names, shapes and types of `expected`."""
    check_weights_header(content, expected)
    try:
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise ValueError(f"is not a safetensors file ({error})") from None


def check_weights_header(content: bytes, expected: Mapping[str, Tensor]) -> None:
    """Compare the header with the model's tensors, which may be on the meta device: nothing is allocated."""
    try:
        (length,) = struct.unpack("<Q", content[:8])
        if length > min(HEADER_BYTES, len(content) - 8):
            raise ValueError(f"its header claims {length} bytes")
        header = parse_json(content[8 : 8 + length])
        found = {
            name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items() if name != "__metadata__"
        }
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"is not a safetensors file ({error})") from None
    wanted = {name: (SAFETENSORS_DTYPES.get(t.dtype), tuple(t.shape)) for name, t in expected.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"does not fit its experiment.json: {shown(name)} should be {wanted.get(name, 'absent')}, "
                f"found {shown(found.get(name, 'none'))}"
            )


def training_state_from(content: bytes) -> dict[str, Any]:
    """The plain values and tensors that `torch.save` wrote; nothing is executed, nothing expands."""
    _check_pickle(content)
    try:
        state = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, KeyError, TypeError, RuntimeError, EOFError, AttributeError, IndexError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None
    if not isinstance(state, dict):
        raise ValueError(f"holds a {type(state).__name__}, should be a dict")
    return state


def _check_pickle(content: bytes) -> None:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            if len(set(names)) < len(names) or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("has compressed or repeated parts, which torch.save does not write")
            if sum(entry.file_size for entry in entries) > len(content):
                raise ValueError("claims to hold more than it has")
            (pickled,) = [archive.read(name) for name in names if name.endswith("/data.pkl")]
    except (zipfile.BadZipFile, RuntimeError, EOFError, OSError, struct.error) as error:  # RuntimeError: encrypted
        raise ValueError(f"is not what torch.save writes ({error})") from None
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in NAMING_OPCODES or (opcode.name == "GLOBAL" and argument not in PICKLED_NAMES):
            raise ValueError(f"refers to {shown(argument or opcode.name)}, which no training state of ours does")


def load_optimizer(optimizer: Optimizer, saved: Any) -> None:
    """Restore the optimizer's state; it must have the numbers of an optimizer over these very parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        raise ValueError("holds no optimizer state")
    for index, values in saved["state"].items():
        if not (isinstance(index, int) and 0 <= index < len(parameters)) or not isinstance(values, dict):
            raise ValueError(f"has state of parameter {shown(index)}, there are {len(parameters)}")
        for name, value in values.items():
            if not isinstance(value, Tensor) or value.shape not in (parameters[index].shape, torch.Size([])):
                raise ValueError(f"{shown(name)} of parameter {index} does not fit it")
            if not value.is_contiguous():  # one number repeated: small in the file, large in memory
                raise ValueError(f"{shown(name)} of parameter {index} is not contiguous")
    ours, theirs = optimizer.state_dict()["param_groups"], saved.get("param_groups")
    if not isinstance(theirs, list) or [sorted(group) for group in theirs] != [sorted(group) for group in ours]:
        raise ValueError("has other parameter groups than its optimizer")
    try:
        optimizer.load_state_dict(saved)
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None
