"""Suites as one shuffled stream of all tasks: ``taskpool=didi/mixed``."""

from ..options import checked
from ..taskpool.mixed_stream import MixedStreamCLIPVisionModelTaskPool
from .folder_pools import FolderCLIPVisionModelTaskPool
from .pools import DemoCLIPVisionModelTaskPool


@checked
class MixedDemoTaskPool(
    DemoCLIPVisionModelTaskPool, MixedStreamCLIPVisionModelTaskPool
):
    """The demo suite's images, shuffled over tasks. Arguments of both classes; ``seed`` is of the suite and of the order."""

    _config_mapping = (
        DemoCLIPVisionModelTaskPool._config_mapping
        | MixedStreamCLIPVisionModelTaskPool._config_mapping
    )


@checked
class MixedFolderTaskPool(
    MixedStreamCLIPVisionModelTaskPool, FolderCLIPVisionModelTaskPool
):
    """The images of a suite's folder, shuffled over tasks. Arguments of both classes."""

    _config_mapping = (
        FolderCLIPVisionModelTaskPool._config_mapping
        | MixedStreamCLIPVisionModelTaskPool._config_mapping
    )
