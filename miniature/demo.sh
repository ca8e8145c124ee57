#!/usr/bin/env bash
# The paper in miniature: tokenizers at alpha 0 and alpha 1, priors on their codes, samples, and the claims measured.
#
#     bash miniature/demo.sh                               # results in demo/
#     DEMO_SEED=1 DEMO_OUT=demo1 bash miniature/demo.sh    # another seed
#     DEMO_ALPHAS="0 0.4 1" bash miniature/demo.sh         # more tokenizers
#     DEMO_STEPS=20000 bash miniature/demo.sh              # a longer fit, for a GPU
#     python miniature/figures.py demo demo1 demo2         # the tables over several seeds
#
# Stop it when you like: the same command goes on.
# Pictures are 32 x 32 (4 x 4 codes, f = 8), networks have about a million parameters. Each alpha has a core of its own:
# on a CPU two processes of one thread each are far faster than one of two threads.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${DEMO_OUT:-demo} seed=${DEMO_SEED:-0} alphas=${DEMO_ALPHAS:-0 1}
steps=${DEMO_STEPS:-2500}      # of phase 1; the other stages follow it
samples=${DEMO_SAMPLES:-1000}  # of each prior, and as many held-out pictures
cores=$(python -c 'import os; print(os.cpu_count() or 1)')  # how many alphas at a time
export OMP_NUM_THREADS=1
mkdir -p "$out"
[ -e "$out/about.json" ] || python - "$seed" "$steps" > "$out/about.json" <<'END'
import json, os, platform, subprocess, sys, torch
commit = subprocess.getoutput("git describe --always --dirty")
processor = subprocess.getoutput("sed -n 's/^model name.*: //p' /proc/cpuinfo 2> /dev/null | head -n 1")
print(json.dumps({"command": f"DEMO_SEED={sys.argv[1]} DEMO_STEPS={sys.argv[2]} bash miniature/demo.sh", "commit": commit,
                  "processor": processor or platform.processor(), "cores": os.cpu_count(),
                  "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "torch": torch.__version__}))
END

# --- how it is run: a stage is a command that is told of signals at once, saves, and ends all after it
child=""
stop() {
  trap '' INT TERM
  for pid in $child $(jobs -p); do kill -TERM "$pid" 2> /dev/null || true; done
  wait
  exit 130
}
trap stop INT TERM
run() { "$@" & child=$!; wait "$child"; child=""; }
log() { printf '== %s\n' "$*"; }
finished() { [ -e "$1" ]; }

# --- what all training shares. Networks this small gain nothing from torch.compile. 16 codes are few for such a picture,
# as the paper's 256 are for a photograph: where codes can hold all of a picture, alpha decides nothing.
common="--data shapes --workers 0 --no-compile --resume --log_every 100"
tokenizer="$common --image_size 32 --vgg $out/vgg/ckpt.pt --batch_size 16 --disc_channels 16 64 --val_n 500
           --eval_every 500 --save_every 200 --seed $seed"
prior="$common --size tiny --views 1 --batch_size 16 --iters $((steps * 16 / 10)) --lr 2e-3 --lr_end 1e-4
       --decay_start 0 --dropout 0 --eval_every 400 --save_every 200 --seed $seed"

# The perceptual network and the evaluation classifier: VGG16 is made for photographs, not for these pictures. Labels
# are finer than the classes (object x colour), for a network that needs no colour forgets it.
train_classifier() { run python miniature/train_vgg.py $common --labels fine --image_size 32 --widths 16 32 48 64 96 \
  --iters $((steps * 3 / 10)) --eval_every 200 --save_every 100 --seed "$1" --out "$out/$2"; }

# FD of samples to five times as many training pictures in the evaluation classifier's features, and the share that it
# takes for the object asked for.
evaluate() { finished "$2" || run python fid.py --real "$out/train.npz" --fake "$1" \
  --features "$out/classifier/ckpt.pt" --workers 0 --json "$2"; }

so_far() { python - "$out" <<'END'
import json, sys
from pathlib import Path
alphas = sorted(Path(sys.argv[1]).glob("alpha*"), key=lambda folder: float(folder.name[5:]))
print("| FD so far |", *(f" alpha {folder.name[5:]} |" for folder in alphas), sep="")
for name, text in (("phase1", "reconstructions, phase 1"), ("phase2", "reconstructions, phase 2"),
                   ("ar1", "AR samples, phase 1"), ("ar2", "AR samples, phase 2"),
                   ("nar1", "NAR samples, phase 1"), ("nar2", "NAR samples, phase 2")):
    files = [folder / f"{name}.json" for folder in alphas]
    if any(file.exists() for file in files):
        print(f"| {text} |", *(f" {json.loads(f.read_text())['FD']:.2f} |" if f.exists() else " |" for f in files), sep="")
END
}

job() {  # everything about one alpha
  local alpha=$1 folder=$out/alpha$1 phase kind options
  trap stop INT TERM  # a subshell forgets its traps
  log "phase 1: encoder, codebook and decoder, Eq. 4 with alpha $alpha (about 10 minutes)"
  run python train_tokenizer.py $tokenizer --alpha "$alpha" --channels 16 32 64 64 --z_dim 32 --codebook_size 256 \
    --iters "$steps" --lr 1.5e-3 --lr_end 1e-4 --vq_start $((steps / 8)) --disc_start $((steps / 10)) \
    --disc_ramp $((steps / 5)) --out "$folder/phase1"
  log "phase 2: encoder and codebook fixed; the decoder, with attention now, is finetuned with alpha 0 (3 minutes)"
  run python train_tokenizer.py $tokenizer --phase 2 --init "$folder/phase1/ckpt.pt" --iters $((steps * 3 / 10)) \
    --lr 1e-3 --lr_end 1e-4 --out "$folder/phase2"
  for phase in 1 2; do
    finished "$folder/phase$phase.json" || run python fid.py --real shapes --n "$samples" --workers 0 \
      --tokenizer "$folder/phase$phase/ckpt.pt" --features "$out/classifier/ckpt.pt" --json "$folder/phase$phase.json"
  done
  so_far
  for kind in ar nar; do
    options="--prior $folder/$kind/best.pt --n $samples --batch_size 100"
    [ $kind = ar ] || options="$options --choice_temperature 4.5"  # MaskGIT's: better here than Table 10's 0.45
    log "the $kind prior on phase 1's codes, which are phase 2's as well (2 minutes)"
    run python train_prior.py $prior --kind $kind --tokenizer "$folder/phase1/ckpt.pt" --codes "$folder/codes" \
      --out "$folder/$kind"
    # the same sampled codes, decoded by either phase
    finished "$folder/${kind}2/samples.npz" || run python sample.py $options --tokenizer "$folder/phase1/ckpt.pt" \
      "$folder/phase2/ckpt.pt" --out "$folder/${kind}1" "$folder/${kind}2"
    for phase in 1 2; do evaluate "$folder/$kind$phase/samples.npz" "$folder/$kind$phase.json"; done
    so_far
  done
}

began=$SECONDS
log "two small classifiers: the perceptual network of the loss, and another to evaluate with (2 minutes)"
(trap stop INT TERM; train_classifier 1 vgg) > "$out/vgg.log" 2>&1 & other=$!
train_classifier 2 classifier
wait "$other" || { cat "$out/vgg.log"; exit 1; }
finished "$out/train.npz" || run python fid.py --real shapes --split train --n $((5 * samples)) --image_size 32 \
  --workers 0 --features "$out/classifier/ckpt.pt" --save "$out/train.npz"

for alpha in $alphas; do
  while [ "$(jobs -rp | wc -l)" -ge "$cores" ]; do sleep 1; done
  (job "$alpha") 2>&1 | (trap '' INT TERM; while IFS= read -r line; do echo "alpha $alpha | $line"; done) &
done
wait  # a job that failed has said why; figures.py then misses its files and ends this script with an error

log "what came out. One seed decides nothing:"
run python miniature/figures.py "$out"
if grep -qs '^| 3 seed(s)' docs/miniature.md; then
  log "docs/miniature.md has the same over three seeds:"
  sed -n '/^| 3 seed(s)/,/^| encoder and codebook/p' docs/miniature.md
fi
echo "done in $(((SECONDS - began) / 60)) minutes; look at $out/view.png, $out/samples.png and $out/phases.png"
