#!/usr/bin/env bash
# Tables 1, 5 and 6 in miniature: one phase, an AR prior on each tokenizer. The same command resumes.
#
#     bash miniature/demo.sh && bash miniature/ablations.sh    # needs demo.sh's networks and its initial checkpoint; writes ablations/
#     ABLATIONS="plain entropy" bash miniature/ablations.sh    # some rows only
#     ABLATIONS_SEED=1 ABLATIONS_OUT=ablations1 bash miniature/ablations.sh
set -euo pipefail
cd "$(dirname "$0")/.."
demo=${DEMO_OUT:-demo} out=${ABLATIONS_OUT:-ablations} seed=${ABLATIONS_SEED:-0} steps=${ABLATIONS_STEPS:-1500}
priors=${ABLATIONS_PRIORS:-4000}
export OMP_NUM_THREADS=1
rows=${ABLATIONS:-plain entropy kmeans factorized base sem D E A B C conv attention long}
[ -e "$demo/train.npz" ] || { echo "ablations.sh: $demo/train.npz is missing: run demo.sh first" >&2; exit 2; }

# Each stage runs as a background job, so that signals reach it immediately; it saves, and the script ends.
child=""
stop() {
  trap '' INT TERM
  for pid in $child $(jobs -p); do kill -TERM "$pid" 2> /dev/null || true; done
  wait
  exit 130
}
trap stop INT TERM
run() { "$@" & child=$!; wait "$child"; child=""; }
finished() { [ -e "$1" ]; }

flags() {  # what a row changes
  local start="--init $demo/start/ckpt.pt --lr 1e-3 --iters $((steps * 2 / 3))"
  case $1 in
    # Table 1: better reconstruction by a larger decoder, by attention, by training; from scratch
    conv) echo "$scratch --extra_blocks 2" ;;
    attention) echo "$scratch --attention 2" ;;
    long) echo "$scratch --iters $((2 * steps))" ;;
    # Table 5: how the codebook is kept in use; so it is initialized at random, as in the paper
    plain) echo "$scratch --entropy_weight 0" ;;
    entropy) echo "$scratch" ;;
    kmeans | factorized) echo "$scratch --quantizer $1" ;;
    # Table 6: layers of the perceptual loss; from demo.sh's initial checkpoint
    base) echo "$start --alpha 0" ;;
    A) echo "$start --perceptual_layers relu1_2 relu2_2 relu3_3 relu4_3 relu5_3 logit" ;;
    B) echo "$start --perceptual_layers relu2_2 relu3_3 relu4_3 relu5_3 logit" ;;
    C) echo "$start --perceptual_layers relu3_3 relu4_3 relu5_3 logit" ;;
    D) echo "$start --perceptual_layers relu4_3 relu5_3 logit" ;;
    sem) echo "$start --perceptual_layers relu5_3 logit" ;;
    E) echo "$start --perceptual_layers logit" ;;
    *) echo "ablations.sh: no row $1" >&2; exit 2 ;;
  esac
}
scratch="--alpha 0 --channels 16 32 64 64 --z_dim 32 --codebook_size 256 --iters $steps --lr 1.5e-3"

row() {
  local folder=$out/$1
  trap stop INT TERM  # a subshell forgets its traps
  run python train_tokenizer.py $common --image_size 32 --vgg "$demo/vgg/ckpt.pt" --batch_size 16 --lr_end 1e-4 \
    --l1_weight 0.5 --adv_weight 0 --eval_every 100 --out "$folder/phase1" $(flags "$1")  # of a flag given twice the last counts
  finished "$folder/phase1.json" || run python fid.py --real "$out/val" --tokenizer "$folder/phase1/ckpt.pt" \
    --workers 0 --feature_net "$demo/classifier/ckpt.pt" --json "$folder/phase1.json"
  run python train_prior.py $common --size tiny --views 1 --batch_size 64 --iters "$priors" --lr 1e-3 --lr_end 1e-4 \
    --decay_start 0 --dropout 0 --eval_every 500 --tokenizer "$folder/phase1/ckpt.pt" --out "$folder/ar"
  finished "$folder/ar1/samples.npz" || run python sample.py --prior "$folder/ar/best.pt" --count 2000 \
    --batch_size 100 --tokenizer "$folder/phase1/ckpt.pt" --out "$folder/ar1"
  finished "$folder/ar1.json" || run python fid.py --real "$demo/train.npz" --fake "$folder/ar1/samples.npz" \
    --workers 0 --feature_net "$demo/classifier/ckpt.pt" --json "$folder/ar1.json"
}

for name in $rows; do flags "$name" > /dev/null; done  # ends here if one of them is no row
mkdir -p "$out"
# The images are written once: drawing them for every row would take longer than reading.
data=$(python -c "import sys, torch; print(torch.load(sys.argv[1], 'cpu', weights_only=True, mmap=True)['args']['data'])" \
  "$demo/start/ckpt.pt")
for part in "train 8000" "val 1000"; do
  set -- $part
  [ -d "$out/$1" ] && continue
  rm -rf "$out/$1.part"
  run python data.py --data "$data" --split "$1" --image_size 32 --count "$2" --workers 2 --out "$out/$1.part" \
    --preview "$out/$1.png"
  mv "$out/$1.part" "$out/$1"
done
common="--data $out/train --val $out/val --workers 0 --no-compile --resume --log_every 100 --seed $seed"
cores=$(python -c 'import os; print(os.cpu_count() or 1)')
for name in $rows; do
  while [ "$(jobs -rp | wc -l)" -ge "$cores" ]; do sleep 1; done
  echo "== $name ($out/$name.log)"
  (row "$name") > "$out/$name.log" 2>&1 &
done
wait
for name in $rows; do
  finished "$out/$name/ar1.json" || { echo "$name failed:"; tail -n 3 "$out/$name.log"; }
done
python miniature/figures.py --ablations "$out"
