#!/usr/bin/env bash
# Tables 1, 5 and 6 in miniature: one phase, alpha 0, an AR prior on each tokenizer. Goes on where it was stopped.
#
#     bash demo.sh && bash ablations.sh             # needs the two networks of demo.sh; results in ablations/
#     ABLATIONS="base none" bash ablations.sh       # some rows only
#     ABLATIONS_SEED=1 ABLATIONS_OUT=ablations1 bash ablations.sh
set -euo pipefail
cd "$(dirname "$0")"
demo=${DEMO_OUT:-demo} out=${ABLATIONS_OUT:-ablations} seed=${ABLATIONS_SEED:-0} steps=${ABLATIONS_STEPS:-400}
export OMP_NUM_THREADS=1
mkdir -p "$out"

flags() {  # what a row changes
  case $1 in
    base) echo "--alpha 0" ;;
    # Table 1: better reconstruction by a larger decoder, by attention, by training
    conv) echo "--alpha 0 --decoder_extra_blocks 2" ;;
    attention) echo "--alpha 0 --decoder_attention 2" ;;
    long) echo "--alpha 0 --iters $((2 * steps))" ;;
    # Table 5: how the codebook is kept in use; so here it begins as in the paper, and gets the time that this takes
    entropy | none | kmeans) echo "--alpha 0 --codebook $1 --vq_start 0 --iters $((2 * steps))" ;;
    factorized) echo "--alpha 0 --codebook factorized --codebook_size 8192 --vq_start 0 --iters $((2 * steps))" ;;
    # Table 6: layers of the perceptual loss
    A) echo "--perceptual_layers relu1_2 relu2_2 relu3_3 relu4_3 relu5_3 logit" ;;
    B) echo "--perceptual_layers relu2_2 relu3_3 relu4_3 relu5_3 logit" ;;
    C) echo "--perceptual_layers relu3_3 relu4_3 relu5_3 logit" ;;
    D) echo "--perceptual_layers relu4_3 relu5_3 logit" ;;
    sem) echo "--perceptual_layers relu5_3 logit" ;;
    E) echo "--perceptual_layers logit" ;;
    *) echo "ablations.sh: no row $1" >&2; exit 2 ;;
  esac
}

row() {
  local run=$out/$1
  # of a flag given twice the last counts: --codebook_size, --iters, --vq_start
  python train_tokenizer.py $common --image_size 32 --vgg "$demo/vgg/ckpt.pt" --batch_size 16 --channels 16 32 64 \
    --z_dim 32 --codebook_size 256 --iters "$steps" --lr 1.5e-3 --lr_end 1e-4 \
    --vq_start $((steps / 8)) --disc_channels 16 64 --r1 1 --disc_start $((steps / 10)) --disc_ramp $((steps / 5)) \
    --val_n 500 --eval_every 1000 --out "$run/phase1" $(flags "$1")
  [ -e "$run/phase1.json" ] || python fid.py --real "$out/val" --tokenizer "$run/phase1/ckpt.pt" --workers 0 \
    --features "$demo/judge/ckpt.pt" --json "$run/phase1.json"
  python train_prior.py $common --classes 10 --size tiny --views 1 --batch_size 16 --iters $((2 * steps)) --lr 2e-3 \
    --lr_end 1e-4 --decay_start 0 --dropout 0 --eval_every 200 --tokenizer "$run/phase1/ckpt.pt" --out "$run/ar"
  [ -e "$run/ar1/samples.npz" ] || python sample.py --prior "$run/ar/best.pt" --tokenizer "$run/phase1/ckpt.pt" \
    --n 1000 --batch_size 100 --out "$run/ar1"
  [ -e "$run/ar1.json" ] || python fid.py --real "$demo/train.npz" --fake "$run/ar1/samples.npz" --workers 0 \
    --features "$demo/judge/ckpt.pt" --json "$run/ar1.json"
}

# The pictures are written out once: with so many runs, drawing them anew each time would cost more than reading.
for part in "train 8000" "val 1000"; do
  set -- $part
  [ -d "$out/$1" ] && continue
  rm -rf "$out/$1.part"
  python data.py --data shapes --split "$1" --image_size 32 --n "$2" --out "$out/$1.part" --preview "$out/$1.png"
  mv "$out/$1.part" "$out/$1"
done
common="--data $out/train --val $out/val --workers 0 --no-compile --resume --log_every 100 --save_every 200 --seed $seed"
lanes=$(python -c 'import os; print(os.cpu_count() or 1)')
for name in ${ABLATIONS:-none entropy kmeans factorized base sem D E A B C conv attention long}; do
  flags "$name" > /dev/null
  while [ "$(jobs -rp | wc -l)" -ge "$lanes" ]; do sleep 1; done
  echo "== $name (about 5 minutes; $out/$name.log)"
  row "$name" > "$out/$name.log" 2>&1 || { echo "$name failed:"; tail -n 3 "$out/$name.log"; } &
done
wait
python figures.py --ablations "$out"
