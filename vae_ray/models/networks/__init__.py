"""Networks by name: one file each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from vae_ray.config import user_code
from vae_ray.config.fields import UserEntry
from vae_ray.errors import UserError
from vae_ray.models.networks.base import EncoderDecoder as EncoderDecoder
from vae_ray.models.networks.base import Network as Network
from vae_ray.models.networks.conv import conv
from vae_ray.models.networks.ladder import Ladder
from vae_ray.models.networks.mlp import mlp
from vae_ray.models.networks.resnet import resnet

NETWORKS: dict[str, Callable[..., Network | tuple[nn.Module, nn.Module]]] = {
    # each takes image_shape, latent_dim, num_params, num_classes and the entry's settings by keyword
    "mlp": mlp,
    "conv": conv,
    "resnet": resnet,
    "ladder": Ladder,
}


def build_network(
    config: Any, *, image_shape: tuple[int, int, int], latent_dim: int, num_params: int, num_classes: int = 0
) -> Network:
    """The network of `model.network`; a pair of encoder and decoder becomes one with a single group."""
    arguments = {"image_shape": image_shape, "latent_dim": latent_dim, "num_params": num_params}
    if num_classes or not isinstance(config, UserEntry):
        arguments["num_classes"] = num_classes
    if isinstance(config, UserEntry):
        built = user_code.call(config.name, config.settings, key="model.network", **arguments)
    else:
        built = NETWORKS[config.name](**arguments, **config.model_dump(exclude={"name"}))
    if isinstance(built, Network):
        return built
    if isinstance(built, tuple) and len(built) == 2 and all(isinstance(part, nn.Module) for part in built):
        return EncoderDecoder(*built, (latent_dim,))
    raise UserError(
        f"model.network: {config.name} returned a {type(built).__name__}, should return (encoder, decoder), two "
        "torch modules, or a vae_ray.models.networks.Network"
    )
