"""Networks and their weights: torch.nn only, one self-contained file per family."""
