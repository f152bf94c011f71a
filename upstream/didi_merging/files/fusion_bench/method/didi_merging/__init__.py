# flake8: noqa F401
from .didi_merging import DiDiMerging
