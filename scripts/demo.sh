#!/usr/bin/env bash
# Convert a slide with the built-in default: bash scripts/demo.sh [SLIDE [MPP]]. Without SLIDE, one is made.
source "$(dirname "$0")/setup.sh"
mkdir -p "$here/demo"
slide=${1:-$here/demo/frozen.ome.tif}
if [ $# -eq 0 ] && [ ! -e "$slide" ]; then
  echo "Making a synthetic frozen section: $slide"
  python "$here/scripts/make_slide.py" "$slide" --size 6144 8192
fi
name=$(basename "$slide")
out="$here/demo/${name%%.*}-ffpe"
wsi-pipeline plan "$slide" ${2:+--mpp "$2"} --overlay "$here/demo/${name%%.*}.overlay.png"
wsi-pipeline convert "$slide" ${2:+--mpp "$2"} -o "$out.ome.zarr" --overwrite
if [ ! -e "$out.ome.zarr" ]; then exit 0; fi # no tissue: convert has said why
wsi-pipeline export "$out.ome.zarr" -o "$out.ome.tif" --overwrite
wsi-pipeline verify "$out.ome.zarr"
cat <<END

Done.
  OME-Zarr  $out.ome.zarr   (napari, Neuroglancer, vizarr, Python)
  OME-TIFF  $out.ome.tif    (QuPath, OpenSlide, ASAP, ImageJ)
  Manifest  $out.ome.zarr/manifest.json
  Look at   $out.ome.zarr.qc.png
END
