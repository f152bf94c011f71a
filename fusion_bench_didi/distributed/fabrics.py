"""The Fabric of a process that does something by itself, though others run beside it."""

import lightning as L
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies import SingleDeviceStrategy


def fabric_of_one(fabric: L.Fabric) -> L.Fabric:
    """A Fabric on the same device, in the same precision, that knows of this process only: its loaders give all samples, it averages nothing."""
    if fabric.world_size == 1:
        return fabric
    return L.Fabric(
        strategy=SingleDeviceStrategy(device=fabric.device),
        plugins=[LightningEnvironment(), fabric._precision],
    )
