"""Sharding over processes with FSDP2."""

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from selfaug.errors import UserError
from selfaug.model.decoder import Decoder, decoder_layers


def shard(model: nn.Module, mesh: Any) -> None:
    """Shard the decoder layers of `model` over the mesh's data-parallel dimension, in place.

    The output head, and with it a tied embedding, stays whole on every process: the loss multiplies with its weight
    directly, chunk by chunk, and gathering it anew for every chunk would cost more than it saves.
    """
    mesh = mesh["data_parallel"]
    decoder = Decoder(model)
    whole = {p for p in decoder.head.module.parameters() if p is not None}
    if any(p.requires_grad for p in whole):
        raise UserError(
            "The output head trains, and trainer=fsdp keeps it whole on every process without exchanging its "
            "gradients: set adapter.freeze=head (with it tied embeddings are frozen), or trainer=ddp."
        )
    for layer in decoder_layers(decoder.body):
        fully_shard(layer, mesh=mesh)
    fully_shard(decoder.body, mesh=mesh, ignored_params=whole)


def reshard(model: nn.Module) -> None:
    """Shard again what a forward pass has gathered and no backward pass has given back: a checkpoint can be read into
    sharded weights only. Does nothing to a model that is whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
