"""What a run costs, and how that grows. Sizes as in bench.py, by the same flags.

    python benchmarks/costs.py --hours 200              # GPU-hours of Tables 9 and 10 at 200 TFLOP/s: counted, no GPU
    python benchmarks/costs.py --hours 150 130 250      # ... phase 1, phase 2 and the transformers at their own rates
    python benchmarks/costs.py --growth                 # time and memory of a step against image size, batch and K
    python benchmarks/costs.py --scaling                # one process against many, and what of it is communication
"""
import json
import os
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial

import bench  # puts the folder above on sys.path
import torch
from bench import Tokenizer

import runtime

# Tables 9 and 10: what is trained, steps, batch.
RUNS = [("ImageNet", "phase 1", 500_000, 256), ("ImageNet", "phase 2", 200_000, 128),
        ("FFHQ", "phase 1", 300_000, 64), ("FFHQ", "phase 2", 200_000, 32),
        ("LSUN cat", "phase 1", 26_000, 64), ("LSUN cat", "phase 2", 200_000, 64),
        ("LSUN bedroom", "phase 1", 48_000, 64), ("LSUN bedroom", "phase 2", 200_000, 64),
        ("LSUN church", "phase 1", 4_000, 32), ("LSUN church", "phase 2", 200_000, 32),
        *[("ImageNet", f"{kind} {size}", 1_500_000, 256) for size in ("base", "large") for kind in ("AR", "NAR")],
        ("FFHQ", "NAR base", 500_000, 32),
        *[(name, f"{kind} base", 500_000, batch) for name, batch in
          (("LSUN cat", 256), ("LSUN bedroom", 256), ("LSUN church", 64)) for kind in ("AR", "NAR")]]


def hours(rates):
    """A run's GPU-hours: its images x TFLOP an image, counted at 256 x 256, / TFLOP/s."""
    args = Namespace(**bench.SIZES["paper"] | {"batch_size": 4, "tokens": 256, "compile": False})
    tflop = {f"phase {phase}": Tokenizer.tflop(args, phase)[0] / 4 for phase in (1, 2)}
    for args.prior in ("base", "large"):
        for kind in ("AR", "NAR"):
            tflop[f"{kind} {args.prior}"] = bench.count_tflop(partial(bench.prior, args, kind.lower())) / 4
    print(f"{'':26} {'million images':>15} {'TFLOP/image':>12} {'TFLOP/s':>8} {'GPU-hours':>10}")
    for name, what, steps, batch in RUNS:
        rate = rates[{"phase 1": 0, "phase 2": 1}.get(what, 2)]
        print(f"{f'{name}, {what}':26} {steps * batch / 1e6:15.1f} {tflop[what]:12.3f} {rate:8.1f} "
              f"{steps * batch * tflop[what] / rate / 3600:10.1f}", flush=True)


def growth(args, device):
    """Beside the measured growth of the time stands that of the counted work, which is the law."""
    b = args.batch_size
    print(f"{'a phase-1 step':34} {'ms':>10} {'times':>8} {'work, times':>12} {'peak MB':>8}")
    for name, law, batch, values in (("image_size", "S^2", max(1, b // 16), (64, 128, 256, 512)),
                                     ("batch_size", "B", b, (b // 4, b // 2, b, 2 * b)),
                                     ("codebook_size", "1 + c K", b, (256, 1024, 4096, 16384))):
        first = None
        for value in values:
            changed = Namespace(**vars(args) | {"batch_size": batch, name: value})
            (seconds, _, peak), (tflop, _) = Tokenizer(changed, device).time(args.seconds), Tokenizer.tflop(changed)
            first = first or (seconds, tflop)
            print(f"{f'{name} {value} (law: {law})':34} {1000 * seconds:10.1f} {seconds / first[0]:8.2f} "
                  f"{tflop / first[1]:12.2f} {peak:8.0f}", flush=True)


def worker(args, device):
    """Of each training step, median ms and ms in communication, as a line of JSON from process 0."""
    spent, all_reduce, found = 0.0, torch.distributed.all_reduce, {}

    def timed(*words, **options):  # all communication within a step; to wait for the slower process is part of it
        nonlocal spent
        bench.synchronize(device)
        begin = time.perf_counter()
        all_reduce(*words, **options)
        bench.synchronize(device)
        spent += time.perf_counter() - begin

    torch.distributed.all_reduce = timed
    steps = {"tokenizer, phase 1": Tokenizer(args, device).step, "AR prior": bench.prior(args, "ar", device)}
    for name, step in steps.items():
        times = []
        for _ in range(10):  # not for so many seconds: all processes must take as many steps
            spent, begin = 0.0, time.perf_counter()
            step()
            bench.synchronize(device)
            times.append((1000 * (time.perf_counter() - begin), 1000 * spent))
        found[name] = [statistics.median(column) for column in zip(*times[2:])]
    if runtime.is_main():
        print(json.dumps(found), flush=True)


def scaling(args, device):
    """The same batch for each process: a step should take as long on many as on one."""
    n = args.processes or (torch.cuda.device_count() if device.type == "cuda" else os.cpu_count())
    names = ("image_size", "batch_size", "codebook_size", "prior", "device", *["size"] * bool(args.size))
    flags = [f"--{name}={getattr(args, name)}" for name in names] + ["--compile" if args.compile else "--no-compile"]
    environment = os.environ | ({} if device.type == "cuda" else {"OMP_NUM_THREADS": "1"})  # one process, one core
    found = []
    for processes in (1, n):
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                               f"--nproc_per_node={processes}", __file__, *flags, "--scaling"],
                              capture_output=True, text=True, env=environment)
        if done.returncode:
            raise runtime.BadInput(f"the steps on {processes} process(es) failed: {done.stderr.strip()[-300:]}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{'a step, ms':26} {'1 process':>10} {f'{n} processes':>12} {'efficiency':>11} {'in communication':>17}")
    for name, (alone, _) in found[0].items():
        together, waiting = found[1][name]
        print(f"{name:26} {alone:10.1f} {together:12.1f} {100 * alone / together:9.1f} % "
              f"{100 * waiting / together:15.1f} %", flush=True)


def main():
    parser = runtime.Parser(__doc__)
    bench.add_size_flags(parser)
    add = parser.add_argument
    add("--hours", type=runtime.rate, nargs="+", help="TFLOP/s: one for all, or of phase 1, phase 2, transformers")
    add("--growth", action="store_true", help="against image size, batch and K")
    add("--scaling", action="store_true", help="against the number of processes")
    add("--processes", type=runtime.positive, help="for --scaling; default: one per GPU, or per CPU core")
    args = parser.parse_args()
    if not (args.hours or args.growth or args.scaling):
        raise runtime.BadInput("nothing to do: give --hours, --growth or --scaling")
    if args.hours and len(args.hours) not in (1, 3):
        raise runtime.BadInput(f"--hours takes one rate or three, not {len(args.hours)}")
    if args.hours:
        hours(args.hours * (3 if len(args.hours) == 1 else 1))
    if args.growth or args.scaling:
        device = bench.setup(args)
        if "RANK" in os.environ:  # started by `scaling`
            return worker(args, device)
        if args.scaling:
            scaling(args, device)
        if args.growth:
            growth(args, device)


if __name__ == "__main__":
    runtime.run(main)
