"""Training: samples, objectives, the loop, and its checkpoints. Never imports ``pipeline``."""
