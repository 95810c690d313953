"""Start a training job on one or more hosts: check it, start its ranks, stop them together."""
