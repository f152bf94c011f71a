"""The host's model pools, opened: base model and checkpoints as sources, adapters merged, images, and the names of tasks."""
