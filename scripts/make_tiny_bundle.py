"""Write a bundle of tiny random weights, to test the pipeline with: python scripts/make_tiny_bundle.py
OUT.safetensors

What it makes of a slide is noise in the shape of tissue: never show it as a result.
"""

import sys

from wsi_pipeline.models.bundle import save_bundle
from wsi_pipeline.models.random_weights import random_weights

if __name__ == "__main__":
    save_bundle(random_weights(), sys.argv[1], overwrite=True)
