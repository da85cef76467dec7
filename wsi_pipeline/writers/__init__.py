"""Floor 1: blocks to bytes. The OME-Zarr is the working store, the OME-TIFF an export of it."""
