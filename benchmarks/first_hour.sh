#!/usr/bin/env bash
# The GPU measurements that docs/speed.md lacks, most important first. The first four parts take at
# most fifteen minutes. A finished part is not run again. Each part writes its log and its results
# to $OUT (default: first_hour/).
#
#     bash benchmarks/first_hour.sh                      # all parts
#     PARTS="phase1 resume" bash benchmarks/first_hour.sh
#     SMALL=1 bash benchmarks/first_hour.sh              # a smoke test for CPUs; takes minutes
#
# Nothing is downloaded: VGG16 has random weights, the images are drawings. The time limits include
# minutes of compilation.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD
out=${OUT:-first_hour}
mkdir -p "$out"
if [ "${SMALL:-}" ]; then
  bench="--size small --seconds 0" batches="2" samples=2 slow=100 n=2
  train="--image_size 32 --channels 16 16 --z_dim 8 --codebook_size 16 --disc_channels 8 8
         --batch_size 16 --device cpu --no-compile"
  demo="DEMO_STEPS=20 DEMO_SAMPLES=60"
else
  bench="--size paper" batches="32 96 64 128" samples=512 slow=1 n=20
  train="--batch_size 32" demo="DEMO_STEPS=20000"
fi
train="train_tokenizer.py --data shapes --vgg $out/vgg.pt $train --log_every 2 --disc_warmup 0"

part() {  # part NAME SECONDS: run the function NAME with a time limit; its output goes to NAME.log
  case " ${PARTS:-phase1 numbers graphs priors phase2 resume naive miniature} " in
    *" $1 "*) ;;
    *) return ;;
  esac
  [ -e "$out/$1.done" ] && return
  echo "== $1, at most $2 s ($out/$1.log)"
  local began=$SECONDS
  if (export -f "$1"; timeout $(($2 * slow)) bash -ec "$1") > "$out/$1.log" 2>&1; then
    touch "$out/$1.done"
  else
    echo "   stopped or failed: $(tail -n 1 "$out/$1.log")"
  fi
  echo "   $((SECONDS - began)) s"
}

# Within a part, what does not compile comes first, so that it is done before the time limit.

# Three ways to compute R1; images/s, peak memory and utilization at several batch sizes, some of
# which may not fit.
phase1() {
  python benchmarks/bench.py $bench --parts r1 --json $out/r1.json
  for b in $batches; do
    python benchmarks/bench.py $bench --parts phase1 --batch_size $b --json $out/phase1_$b.json ||
      echo "batch size $b failed"
  done
  ls $out/phase1_*.json
}
numbers() { python benchmarks/check.py; }  # compares results with a CPU's
graphs() {  # a training run: the log should have no "Recompiling" after the first validation
  TORCH_LOGS=recompiles,graph_breaks python $train --iters $((2 * n)) --eval_every $n --out $out/run
}
priors() {
  python benchmarks/bench.py $bench --parts sampling --batch_size $samples --json $out/sampling.json
  python benchmarks/bench.py $bench --parts priors --json $out/priors.json
}
phase2() {
  python benchmarks/bench.py $bench --parts phase2 --batch_size 16 --json $out/phase2.json
}
resume() {  # stops a run by SIGTERM, then resumes it
  python $train --iters 100000 --out $out/killed & pid=$!
  until grep -q '"train"' $out/killed/metrics.jsonl 2> /dev/null; do sleep 1; kill -0 $pid; done
  kill -TERM $pid
  wait $pid || [ $? = 143 ]  # 128 + SIGTERM: the run has saved a checkpoint
  step=$(python -c "import torch
print(torch.load('$out/killed/ckpt.pt', 'cpu', weights_only=True)['step'])")
  python train_tokenizer.py --resume --out $out/killed --iters $((step + n))
}
naive() { python benchmarks/bench.py $bench --parts naive --json $out/naive.json; }
miniature() { env $demo DEMO_OUT=$out/demo bash miniature/demo.sh; }

export out bench batches samples train demo n
[ -e "$out/vgg.pt" ] || python - "$out/vgg.pt" "${SMALL:-}" <<'END'
import sys, torch, torchvision, losses
small = losses.SmallVGG([8] * 5, [6]).eval()
torch.save({"component": "vgg", "config": small.config, "model": small.state_dict()}
           if sys.argv[2] else torchvision.models.vgg16().state_dict(), sys.argv[1])
END
part phase1 300
part numbers 240
part graphs 120
part priors 180
part phase2 90
part resume 90
part naive 300
part miniature 1200
