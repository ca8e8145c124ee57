#!/usr/bin/env bash
# Tables 1, 5 and 6 in miniature: phase 1 of a tokenizer and an AR prior for each row. It uses the
# networks and the initial checkpoint of demo.sh. The same command resumes.
#
#     bash miniature/demo.sh && bash miniature/ablations.sh    # results in ablations/
#     ABLATIONS="plain entropy" bash miniature/ablations.sh    # only these rows
#     DEMO_OUT=demo1 ABLATIONS_SEED=1 ABLATIONS_OUT=ablations1 bash miniature/ablations.sh
set -euo pipefail
cd "$(dirname "$0")/.."
demo=${DEMO_OUT:-demo} out=${ABLATIONS_OUT:-ablations} seed=${ABLATIONS_SEED:-0}
# Steps of a tokenizer from scratch (Tables 1 and 5). From the initial checkpoint (Table 6) it takes
# two thirds of them.
steps=${ABLATIONS_STEPS:-1500}
priors=${ABLATIONS_PRIORS:-3000}  # steps of an AR prior
export OMP_NUM_THREADS=1
rows=${ABLATIONS:-plain entropy kmeans factorized base sem D E A B C conv attention long}
if ! [ -e "$demo/train.npz" ]; then
  echo "ablations.sh: $demo/train.npz is missing: run demo.sh first" >&2
  exit 2
fi

# Each stage runs as a background job, so that signals reach it immediately. It saves, and the
# script ends.
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

flags() {  # flags of train_tokenizer.py that belong to a row
  local start="--init $demo/start/ckpt.pt --lr 1e-3 --iters $((steps * 2 / 3))"
  case $1 in
    # Table 1, from scratch: more blocks, attention, longer training
    conv) echo "$scratch --extra_blocks 2" ;;
    attention) echo "$scratch --attention 2" ;;
    long) echo "$scratch --iters $((2 * steps))" ;;
    # Table 5, from scratch, as the initial codebook matters: how the codebook is kept in use
    plain) echo "$scratch --entropy_weight 0" ;;
    entropy) echo "$scratch" ;;
    kmeans | factorized) echo "$scratch --quantizer $1" ;;
    # Table 6, from demo.sh's initial checkpoint: layers of the perceptual loss
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
  trap stop INT TERM  # a subshell does not inherit traps
  # A later flag overrides an earlier one, so the row's own flags come last.
  run python train_tokenizer.py $common --image_size 32 --vgg "$demo/vgg/ckpt.pt" --batch_size 16 \
    --lr_end 1e-4 --l1_weight 0.5 --adv_weight 0 --eval_every 100 --out "$folder/phase1" \
    $(flags "$1")
  finished "$folder/phase1.json" || run python fid.py --real "$out/val" --workers 0 \
    --tokenizer "$folder/phase1/ckpt.pt" --feature_net "$demo/classifier/ckpt.pt" \
    --json "$folder/phase1.json"
  run python train_prior.py $common --size tiny --views 1 --batch_size 64 --iters "$priors" \
    --lr 1e-3 --lr_end 1e-4 --decay_start 0 --dropout 0 --eval_every 500 \
    --tokenizer "$folder/phase1/ckpt.pt" --out "$folder/ar"
  finished "$folder/ar1/samples.npz" || run python sample.py --prior "$folder/ar/best.pt" \
    --count 2000 --batch_size 100 --tokenizer "$folder/phase1/ckpt.pt" --out "$folder/ar1"
  finished "$folder/ar1.json" || run python fid.py --real "$demo/train.npz" --workers 0 \
    --fake "$folder/ar1/samples.npz" --feature_net "$demo/classifier/ckpt.pt" \
    --json "$folder/ar1.json"
}

for name in $rows; do flags "$name" > /dev/null; done  # exits if a row does not exist
mkdir -p "$out"
# All 30,000 training and 2,000 validation images, as in demo.sh. They are exported once: drawing
# them for each row takes longer than reading them.
data=$(python - "$demo/start/ckpt.pt" <<'END'
import sys, torch
print(torch.load(sys.argv[1], "cpu", weights_only=True, mmap=True)["args"]["data"])
END
)
for split in train val; do
  [ -d "$out/$split" ] && continue
  rm -rf "$out/$split.part"
  run python data.py --data "$data" --split $split --image_size 32 --workers 2 \
    --out "$out/$split.part"
  mv "$out/$split.part" "$out/$split"
done
common="--data $out/train --val $out/val --workers 0 --no-compile --resume --log_every 100"
common="$common --seed $seed"
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
