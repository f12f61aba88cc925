"""The two towers: network, encoders, model files, checkpoints of the published entry."""
