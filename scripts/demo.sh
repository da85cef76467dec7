#!/usr/bin/env bash
# Convert a slide with the built-in default: bash scripts/demo.sh [SLIDE [MPP]]. Without SLIDE, one is made.
source "$(dirname "$0")/setup.sh"
mkdir -p demo
slide=${1:-demo/frozen.ome.tif}
if [ $# -eq 0 ] && [ ! -e "$slide" ]; then
  echo "Making a synthetic frozen section: $slide"
  python scripts/make_slide.py "$slide" --size 6144 8192
fi
name=$(basename "${slide%%.*}")
wsi-pipeline plan "$slide" ${2:+--mpp "$2"} --overlay "demo/$name.overlay.png"
wsi-pipeline convert "$slide" ${2:+--mpp "$2"} -o "demo/$name-ffpe.ome.zarr" --overwrite
wsi-pipeline export "demo/$name-ffpe.ome.zarr" -o "demo/$name-ffpe.ome.tif" --overwrite
wsi-pipeline verify "demo/$name-ffpe.ome.zarr"
cat <<END

Done.
  OME-Zarr  demo/$name-ffpe.ome.zarr   (napari, Neuroglancer, vizarr, Python)
  OME-TIFF  demo/$name-ffpe.ome.tif    (QuPath, OpenSlide, ASAP, ImageJ)
  Manifest  demo/$name-ffpe.ome.zarr/manifest.json
  Look at   demo/$name-ffpe.qc.png
END
