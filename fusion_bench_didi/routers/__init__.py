"""Routers: features of the input in, weights over the tasks out.

``oracle | representation | projection | mlp | none``; see :mod:`.base` for the interface. ``none`` is no router: the task
is set from outside.
"""

from .base import Router, weights_from
from .features import FeatureRouter, OracleRouter
from .files import ROUTERS, make_router, read_router, write_router
from .projection import ProjectionRouter
from .representation import RepresentationRouter

__all__ = [
    "FeatureRouter",
    "OracleRouter",
    "ProjectionRouter",
    "ROUTERS",
    "RepresentationRouter",
    "Router",
    "make_router",
    "read_router",
    "weights_from",
    "write_router",
]
