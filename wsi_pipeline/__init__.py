"""Whole-slide translation of fresh-frozen sections to FFPE style."""
