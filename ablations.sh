#!/usr/bin/env bash
# Tables 1, 5 and 6 in miniature: one phase, alpha 0, an AR prior on each tokenizer. Goes on where it was stopped.
#
#     bash demo.sh && bash ablations.sh             # needs the two networks of demo.sh; results in ablations/
#     ABLATIONS="base none" bash ablations.sh       # some rows only
#     ABLATIONS_SEED=1 ABLATIONS_OUT=ablations1 bash ablations.sh
set -euo pipefail
cd "$(dirname "$0")"
demo=${DEMO_OUT:-demo} out=${ABLATIONS_OUT:-ablations} seed=${ABLATIONS_SEED:-0} steps=${ABLATIONS_STEPS:-600}
export OMP_NUM_THREADS=1
mkdir -p "$out"

flags() {  # what a row changes
  case $1 in
    base) ;;
    # Table 1: better reconstruction by a larger decoder, by attention, by training
    conv) echo "--decoder_extra_blocks 2" ;;
    attention) echo "--decoder_attention 2" ;;
    long) echo "--iters $((2 * steps))" ;;
    # Table 5: codebooks
    none | kmeans) echo "--codebook $1" ;;
    factorized) echo "--codebook factorized --codebook_size 8192" ;;
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
  # a flag given twice counts the last time: --codebook_size, --iters
  python train_tokenizer.py --data shapes --image_size 32 --vgg "$demo/vgg/ckpt.pt" --batch_size 16 --channels 16 32 64 \
    --z_dim 32 --codebook_size 256 --alpha 0 --l1_weight 10 --iters "$steps" --lr 2e-3 --lr_end 1e-4 \
    --disc_channels 16 64 --r1 1 --disc_start $((steps / 10)) --disc_ramp $((steps / 5)) --workers 0 --val_n 500 \
    --log_every 100 --eval_every 1000 --save_every 200 --seed "$seed" --resume --out "$run/phase1" $(flags "$1")
  [ -e "$run/phase1.json" ] || python fid.py --real shapes --n 1000 --workers 0 --tokenizer "$run/phase1/ckpt.pt" \
    --features "$demo/judge/ckpt.pt" --json "$run/phase1.json"
  python train_prior.py --data shapes --classes 10 --size tiny --views 1 --batch_size 32 --iters "$steps" --lr 2e-3 \
    --lr_end 1e-4 --decay_start 0 --dropout 0 --workers 0 --log_every 100 --eval_every 100 --save_every 200 \
    --seed "$seed" --resume --tokenizer "$run/phase1/ckpt.pt" --out "$run/ar"
  [ -e "$run/ar1/samples.npz" ] || python sample.py --prior "$run/ar/best.pt" --tokenizer "$run/phase1/ckpt.pt" \
    --n 1000 --batch_size 100 --out "$run/ar1"
  [ -e "$run/ar1.json" ] || python fid.py --real "$demo/train.npz" --fake "$run/ar1/samples.npz" --workers 0 \
    --features "$demo/judge/ckpt.pt" --json "$run/ar1.json"
}

lanes=$(python -c 'import os; print(os.cpu_count() or 1)')
for name in ${ABLATIONS:-base none kmeans factorized conv attention long A B C D sem E}; do
  flags "$name" > /dev/null
  while [ "$(jobs -rp | wc -l)" -ge "$lanes" ]; do sleep 1; done
  echo "== $name (about 6 minutes; $out/$name.log)"
  row "$name" > "$out/$name.log" 2>&1 || { echo "$name failed:"; tail -n 3 "$out/$name.log"; } &
done
wait
python figures.py --ablations "$out"
