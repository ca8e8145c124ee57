#!/usr/bin/env bash
# The paper in small: from nothing to both phases of the tokenizer, a prior and samples. No download, no GPU.
#
#     bash demo.sh            # results in demo/; stop it when you like, run it again and it goes on
#
# Pictures are 32 x 32 (8 x 8 codes), networks have about a million parameters, so that two CPU cores are enough. With
# so few steps L1 has to lead (--l1_weight 4; the paper's sum is 1:1:1), or phase 1 is all colour fringes.
set -euo pipefail
trap 'exit 130' INT TERM  # a stage that is told to stop saves and ends well; the next must not begin
cd "$(dirname "$0")"
out=${DEMO_OUT:-demo}
steps=${DEMO_STEPS:-3000}              # of phase 1; the other stages follow it
cores=$(python -c 'import os; print(min(4, os.cpu_count() or 1))')
# One process per core: on a CPU two processes of one thread each are far faster than one of two threads, and the
# losses are the same. On a GPU one process is enough.
gpu=$(python -c 'import torch; print(int(torch.cuda.is_available() or torch.backends.mps.is_available()))')
if [ "$gpu" = 1 ] || [ "$cores" = 1 ]; then launch=python; else
  export OMP_NUM_THREADS=1
  # 4 divides every share of the batch: minibatch deviation then has the groups of a single process
  launch="python -m torch.distributed.run --standalone --nproc_per_node=$(( cores >= 4 ? 4 : 2 ))"
fi
stage() { printf '\n== %s\n' "$1"; }
began=$SECONDS

stage "a network that sees: objects and colours (VGG16 knows photographs, not these pictures)"
python train_vgg.py --data shapes --labels fine --image_size 32 --widths 16 32 48 64 96 \
  --iters $((steps / 5)) --workers 0 --out "$out/vgg" --resume

common="--data shapes --image_size 32 --vgg $out/vgg/ckpt.pt --batch_size 16 --disc_channels 16 64 --r1 1
        --l1_weight 4 --workers 0 --val_n 512 --log_every 100 --eval_every 500 --save_every 250 --resume"

stage "phase 1, alpha = 1: encoder, codebook and decoder, for semantic compression"
$launch train_tokenizer.py $common --alpha 1 --channels 16 32 64 --z_dim 32 --codebook_size 256 \
  --iters "$steps" --lr 1e-3 --lr_end 1e-4 --disc_start $((steps / 10)) --disc_ramp $((steps / 5)) --out "$out/phase1"

stage "phase 2, alpha = 0: the decoder alone, with attention, for details"
$launch train_tokenizer.py $common --phase 2 --init "$out/phase1/ckpt.pt" \
  --iters $((steps / 4)) --lr 5e-4 --lr_end 5e-5 --out "$out/phase2"

stage "the prior, AR: a transformer learns to predict the codes"
$launch train_prior.py --data shapes --tokenizer "$out/phase1/ckpt.pt" --classes 10 --size tiny --views 2 \
  --batch_size 64 --iters $((steps * 2 / 5)) --lr 2e-3 --lr_end 1e-4 --decay_start 0 --dropout 0 --workers 0 \
  --log_every 100 --eval_every 250 --save_every 250 --codes "$out/codes" --out "$out/ar" --resume

stage "the prior, NAR: the same transformer without the causal mask learns to fill masked codes"
$launch train_prior.py --data shapes --tokenizer "$out/phase1/ckpt.pt" --classes 10 --size tiny --views 2 --kind nar \
  --batch_size 64 --iters $((steps * 2 / 5)) --lr 2e-3 --lr_end 1e-4 --decay_start 0 --dropout 0 --workers 0 \
  --log_every 100 --eval_every 250 --save_every 250 --codes "$out/codes" --out "$out/nar" --resume

stage "samples, decoded by phase 2's decoder: the prior was trained on phase 1's codes, and they are the same"
for kind in ar nar; do
  [ -e "$out/samples-$kind/samples.npz" ] || python sample.py --prior "$out/$kind/best.pt" \
    --tokenizer "$out/phase2/ckpt.pt" --n 500 --batch_size 100 --out "$out/samples-$kind"
done
for kind in ar nar; do
  printf '%s: share of samples that the network above takes for the object asked for, and a distance in its features\n' $kind
  python fid.py --real shapes --split val --image_size 32 --fake "$out/samples-$kind/samples.npz" --workers 0 \
    --features "$out/vgg/ckpt.pt"
done
python sample.py --teacher_forced shapes --n 8 --runs "$out/ar/best.pt:$out/phase1/ckpt.pt" \
  "$out/ar/best.pt:$out/phase2/ckpt.pt" --out "$out/view"

stage "what came out (held-out pictures; one seed, one alpha: a demonstration, not a result)"
python - "$out" <<'PY'
import json, sys, torch
import data, vq
out = sys.argv[1]
last = lambda run: [v for v in map(json.loads, open(f"{out}/{run}/metrics.jsonl")) if v["split"] == "val"][-1]
one, two, ar, nar = map(last, ("phase1", "phase2", "ar", "nar"))
print(f"{'':24}{'phase 1':>10}{'phase 2':>10}")
for name, text in (("l1", "L1"), ("psnr", "PSNR (dB)"), ("usage", "share of codes used"), ("perplexity", "perplexity of codes")):
    print(f"{text:24}{one[name]:10.3f}{two[name]:10.3f}")
print(f"prior, nats a code: ln K {ar['lnK']:.3f}, without context {ar['H']:.3f}, AR {ar['loss']:.3f}, "
      f"NAR {nar['loss']:.3f} (masked codes)")
models = [vq.load_tokenizer(f"{out}/{run}/ckpt.pt") for run in ("phase1", "phase2")]
print("codes of both phases are", "the same" if len({vq.fingerprint(m) for m in models}) == 1 else "DIFFERENT")
images = data.EvalImages(data.Shapes("val"), 32)
x = data.to_float(torch.stack([images[i][0] for i in range(100, 116)]), torch.device("cpu"))
with torch.no_grad():
    rows = [x] + [m(x)[0] for m in models]
data.save_grid(f"{out}/reconstructions.png", torch.cat(rows), 16, scale=2)
print(f"look at {out}/reconstructions.png (input, phase 1, phase 2), {out}/samples-ar/grid.png, "
      f"{out}/samples-nar/grid.png, {out}/view/teacher_forced.png")
PY
echo "done in $(( (SECONDS - began) / 60 )) min $(( (SECONDS - began) % 60 )) s"
