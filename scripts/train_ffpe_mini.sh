#!/usr/bin/env bash
# Reproduce the weights of ffpe_mini: bash scripts/train_ffpe_mini.sh PICTURES [RUN]
# PICTURES: folder with the five Pathology Atlas regions (JPEG); one CPU core takes an hour. Run it again to go on.
extra=train
source "$(dirname "$0")/setup.sh"
pictures=$(cd "$1" && pwd)
run=${2:-$here/out/ffpe_mini}
mkdir -p "$(dirname "$run")"
{
  echo slide,domain,patient,split,mpp
  for row in breast-lobular-carcinoma:train:0.5056 cholesterolpolyp:train:0.5 ectopic-pancreas:train:0.526 \
    anthracosis:train:0.5 lung-squamous-cell-carcinoma:test:0.526; do # the last one is held out
    IFS=: read -r name split mpp <<<"$row"
    echo "$(ls "$pictures/$name"*.jpg),FFPE,$name,$split,$mpp"
  done
} >"$run.csv"
wsi-pipeline tile "$run.csv" -o "$run.parquet" --set filters.min_tissue=0.4 --set tiling.stride=250
OMP_NUM_THREADS=1 wsi-pipeline train "$here/configs/train_ffpe_mini.yaml" -o "$run" --set data.target="$run.parquet"
echo "To ship it: cp $run/generator.safetensors $here/wsi_pipeline/generators/ffpe_mini.safetensors"
