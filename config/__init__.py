"""Configurations for Hydra, which takes a package without this file for one that is not there, and warns of it."""
