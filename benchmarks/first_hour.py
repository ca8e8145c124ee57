"""The first hour on a GPU: the figures that docs/speed.md lacks, in parts of at most ten minutes.

    python benchmarks/first_hour.py                # all parts but the miniature, in order, then the table
    python benchmarks/first_hour.py --part 3       # one part (several: --part 3 5); 0: all in order
    python benchmarks/first_hour.py --part 8       # the miniature takes longer: the same command goes on
    python benchmarks/first_hour.py --table        # only the table of all results so far
    python benchmarks/first_hour.py --small        # seconds on a CPU (the default without a GPU): does it all run?

Parts: 1 versions and matrix rate, 2 bench.py, 3 phase 1, 4 kill and --resume, 5 phase 2, 6 priors, 7 samples, 8 the
miniature with three seeds, 9 bench.py --naive. 5 and 6 need part 3; 7 needs 5 and 6. Each runs the real scripts.
--out gets partN.json (figures, hardware, versions) and partN.log (all output), --runs pictures and checkpoints, about
20 GB at the paper's size. Nothing is downloaded.
"""
import argparse
import importlib
import json
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
import torchvision

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "miniature")]

import runtime  # noqa: E402

# `pictures`: how many, and how many for validation. Batches are one GPU's share of the paper's on eight.
PAPER = dict(
    image_size=256, pictures=(2000, 256), samples=512, options="", bench="--size paper", network="--batch_size 32",
    phase1="--iters 300 --log_every 20 --eval_every 100 --r1_every 4",
    phase2="--iters 200 --log_every 20 --batch_size 16", prior="--iters 200 --log_every 20 --batch_size 32",
    priors=("ar_base", "nar_base", "ar_large", "nar_large"), demo="DEMO_STEPS=20000")
SMALL = dict(
    image_size=32, pictures=(40, 20), samples=4, options="--no-compile",
    bench="--size small --image_size 32 --batch_size 2 --seconds 0",
    network="--batch_size 4 --image_size 32 --channels 16 16 16 --z_dim 8 --codebook_size 32 --disc_channels 8 8",
    phase1="--iters 12 --log_every 2 --eval_every 4 --r1_every 4", phase2="--iters 4 --log_every 1 --batch_size 4",
    prior="--iters 4 --log_every 1 --batch_size 4", priors=("ar_tiny", "nar_tiny"),
    demo="DEMO_STEPS=20 DEMO_SAMPLES=100")
# Commands of ours start here, in a process of their own, with `inside`.
PYTHON = [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(ROOT / 'benchmarks')!r}]; import first_hour; "
                                "first_hour.inside()"]


class Failed(Exception):
    """What went wrong in a part, and the output of its command. The next part goes on."""

    def __init__(self, message, text=""):
        super().__init__(message)
        self.text = text


# ------------------------------------------------------------------------------------- in a process of its own

def inside():
    """Run the script that the command line names with probes, or `run_bench`."""
    name = sys.argv[1]
    del sys.argv[0]
    runtime.Run, runtime.Progress = Run, Progress
    runtime.run(importlib.import_module(Path(name).stem).main if ".py" in name else lambda: run_bench(name))


def probe(what, **values):
    """Print a line for `probes`: the time, and the peak of memory since the last one (on a CPU: since the start)."""
    if torch.cuda.is_available():
        values["peak_MB"] = torch.cuda.max_memory_allocated() / 2**20
        values["reserved_MB"] = torch.cuda.memory_reserved() / 2**20
        torch.cuda.reset_peak_memory_stats()
    else:
        values["peak_MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("probe " + json.dumps({"what": what, "time": time.perf_counter(), **values}), flush=True)


class Run(runtime.Run):
    def progress(self, step, **values):  # after each progress line, which has waited for the GPU
        super().progress(step, **values)
        probe("train", step=step, n=step * self.args.batch_size)


class Progress(runtime.Progress):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        probe(self.what, n=0)

    def __call__(self, n):
        super().__call__(n)
        probe(self.what, n=self.done)


def run_bench(what):
    """The matrix rate; or the rows that are most in doubt (R1, the discriminator) and then bench.py; or its --naive."""
    import bench
    parser = runtime.Parser(__doc__)
    bench.add_size_flags(parser)
    args = parser.parse_args()
    device = bench.setup(args)
    if what == "rate":  # as bench.py's `stages`
        dtype, n = (torch.bfloat16, 8192) if device.type == "cuda" else (torch.float32, 2048)
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        probe(f"matrix product, {dtype}", TFLOP_per_s=2 * n**3 / 1e12 / bench.measure(lambda: a @ b, device, 1)[0])
    elif what == "naive":
        bench.naive(args, device)
    else:
        tokenizer = bench.Tokenizer(args, device)
        step, r1, peak = tokenizer.time(args.seconds)
        probe("first: phase-1 step with a 16th of R1", ms=1000 * step, peak_of_it_MB=peak)
        probe("first: R1, when it is due", ms=1000 * r1 * tokenizer.flags.r1_every)
        for name, call in tokenizer.parts().items():
            if "discriminator" in name:
                probe(f"first: {name}", ms=1000 * bench.measure(call, device, args.seconds)[0])
        del tokenizer, call
        bench.main()



# ------------------------------------------------------------------------------------------- what parts share

class Hour:
    """Sizes, folders and the time that is left to a part."""

    def __init__(self, args):
        self.args, self.size = args, argparse.Namespace(**(SMALL if args.small else PAPER))
        self.out, self.runs = Path(args.out).resolve(), Path(args.runs).resolve()
        self.vgg = Path(args.vgg).resolve() if args.vgg else self.runs / "vgg16_random.pt"

    def start(self, *words, stop=None, expect=(0,), **env):
        """Run a command within the time left -> its output. stop=(signal, step): send it after that step's progress
        line. Failed if the exit code is not one of `expect` (None: cut off)."""
        words, before = [str(word) for word in words], self.log.stat().st_size
        print("$", shlex.join(words), flush=True)
        with open(self.log, "ab") as file:
            process = subprocess.Popen(words if words[0] == "bash" else PYTHON + words, cwd=ROOT, env=os.environ | env,
                                       stdout=file, stderr=subprocess.STDOUT, start_new_session=True)

        def text():
            return self.log.read_bytes()[before:].decode(errors="replace")
        try:
            while stop and process.poll() is None and time.monotonic() < self.deadline:
                if any(p["step"] >= stop[1] for p in probes(text(), "train")):
                    process.send_signal(stop[0])
                    break
                time.sleep(0.02)
            code = process.wait(max(1, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
        finally:  # loading processes as well, also where this script itself is interrupted
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code not in expect:
            lines = [line for line in text().splitlines() if line.strip() and not line.startswith("probe ")]
            why = f"cut off after {self.args.limit} s" if code is None else f"exit code {code}"
            raise Failed("\n".join([why, *lines[-6:]]), text())
        return text()

    def train(self, name, script, *words, **options):
        """A training run in runs/name -> its output. What it reads is made once."""
        words = [script, *words, *self.size.options.split(), "--out", self.runs / name]
        for flag, n in zip(("--data", "--val"), self.size.pictures):
            folder = self.runs / f"pictures{flag}{self.size.image_size}"
            if not folder.exists():  # renamed when it is whole. Drawing them in training would be the limit.
                part = folder.with_name("part")
                shutil.rmtree(part, ignore_errors=True)
                self.start("data.py", "--data", "shapes", "--split", "val" if flag == "--val" else "train", "--n", n,
                           "--image_size", self.size.image_size, "--out", part, "--preview", self.runs / "preview.png")
                part.rename(folder)
            words += [flag, folder]
        if script == "train_tokenizer.py":
            if not self.args.vgg and not self.vgg.exists():
                state = torchvision.models.vgg16(weights=None).state_dict()
                runtime.save_file(self.vgg, lambda file: torch.save(state, file))
            words += ["--vgg", self.vgg]
        if "--resume" not in words:
            shutil.rmtree(self.runs / name, ignore_errors=True)
        return self.start(*words, **options)

    def need(self, name, part):
        """The checkpoint of an earlier part."""
        path = self.runs / name / "ckpt.pt"
        if not path.exists():
            raise Failed(f"{path} is missing: run --part {part} first")
        return path

    def figures(self, name, text):
        """Speed, memory and losses of a training run."""
        lines = [v for v in runtime.read_metrics(self.runs / name / "metrics.jsonl") if v["split"] == "train"]
        finite = all(v["loss"] is not None and not v["skipped"] and not v.get("skipped_d") for v in lines)
        return speed(text, "train") | {"first_loss": lines[0]["loss"], "last_loss": lines[-1]["loss"], "finite": finite}


def probes(text, what=""):
    """The probes of an output whose `what` starts so, but for a line that is being written."""
    found = [json.loads(line[6:]) for line in text.splitlines(True) if line.startswith("probe ") and line[-1] == "\n"]
    return [values for values in found if values["what"].startswith(what)]


def speed(text, what):
    """Images a second, without the first window between two probes (there, networks are compiled) where there are
    more, and without validations, before and after which n is the same; what the first window took; the peak."""
    found = probes(text, what)
    windows = [(b["n"] - a["n"], b["time"] - a["time"]) for a, b in pairwise(found) if b["n"] > a["n"]]
    if not windows:
        raise Failed(f"no progress of {what}", text)
    n, seconds = map(sum, zip(*(windows[1:] or windows)))
    return {"images_per_s": n / seconds, "first_window_s": windows[0][1], "peak_MB": max(p["peak_MB"] for p in found)}


def bench_rows(h, what, width, names):
    """Rows of run_bench: its probes, then those of bench.py (a name of `width`, numbers); also of one cut off."""
    try:
        text, failed = h.start(what, *h.size.bench.split()), None
    except Failed as error:
        text, failed = error.text, error
    for values in probes(text):
        yield values["what"], {name: values[name] for name in values.keys() - {"what", "time", "reserved_MB"}}
    for line in text.splitlines():
        numbers = line[width:].replace("%", "").split()
        if line[:width].strip() and numbers and all(re.fullmatch(r"[\d.]+|nan", word) for word in numbers):
            yield line[:width].strip(), {k: float(v) for k, v in zip(names, numbers) if v != "nan"}
    if failed:
        raise failed


# -------------------------------------------------------------------- the parts: each yields (row, {name: value})

def versions(h):
    if shutil.which("nvidia-smi"):
        h.start("bash", "-c", "nvidia-smi")
    yield "hardware and versions", machine()
    yield from bench_rows(h, "rate", 40, ())


def benchmark(h):
    yield from bench_rows(h, "first", 40, ("images_per_s", "TFLOP_per_image", "TFLOP_per_s", "share_%", "peak_MB"))


def naive(h):
    yield from bench_rows(h, "naive", 65, ("ms", "times", "peak_MB"))


def phase1(h):
    words = f"{h.size.network} {h.size.phase1}".split()
    text = h.train("phase1", "train_tokenizer.py", *words, TORCH_LOGS="recompiles")
    yield "phase 1, R1 every 4 steps", h.figures("phase1", text)
    found = probes(text, "train")
    at = next(i for i in range(1, len(found)) if found[i]["n"] == found[i - 1]["n"])  # the first validation
    for name in found[0].keys() & {"peak_MB", "reserved_MB"}:  # the last probe is of the last validation
        yield f"{name} of windows after a validation", {"first": found[at + 1][name], "last": found[-2][name]}
    if not h.args.small:
        before, _, after = text.partition("| val l1")
        yield "recompilations", {"to the first validation": before.count("Recompiling function"),
                                 "after it": after.count("Recompiling function")}


def kill(h):
    words = f"train_tokenizer.py {h.size.network} --iters 60 --log_every 1 --save_every 10".split()
    text = h.train("killed", *words, stop=(signal.SIGTERM, 13))
    if not (saved := re.search(r"stopped by a signal; .* holds step (\d+)", text)):
        raise Failed("SIGTERM: the run does not say that it stopped", text)
    yield "SIGTERM: it saves and says so", {"step": int(saved[1])}
    text = h.train("killed", *words, "--resume", stop=(signal.SIGKILL, 33), expect=(-signal.SIGKILL,))
    yield "--resume, then SIGKILL", {"from_step": probes(text, "train")[0]["step"]}
    steps = [p["step"] for p in probes(h.train("killed", *words, "--resume"), "train")]
    yield "--resume, to the end", {"from_step": steps[0], "to_step": steps[-1]}
    if steps[0] < 30 or steps[-1] != 60:  # 30 was saved before the SIGKILL
        raise Failed("the last run did not go from step 30 or later to 60")


def phase2(h):
    words = ["--phase", 2, "--init", h.need("phase1", 3), *h.size.phase2.split()]
    yield "phase 2", h.figures("phase2", h.train("phase2", "train_tokenizer.py", *words))


def priors(h):
    shutil.rmtree(h.runs / "codes", ignore_errors=True)  # encoded once, by the first of them
    for name in h.size.priors:
        kind, size = name.split("_")
        text = h.train(name, "train_prior.py", "--tokenizer", h.need("phase1", 3), "--kind", kind, "--size", size,
                       "--views", 1, "--codes", h.runs / "codes" / "codes", *h.size.prior.split())
        if found := probes(text, "encoding"):
            yield "encoding for the code cache", speed(text, found[0]["what"])
        yield name, h.figures(name, text)
        (h.runs / name / "best.pt").unlink(missing_ok=True)  # ckpt.pt once more, up to 4 GB


def samples(h):
    for name in h.size.priors:
        out = h.runs / f"samples_{name}"
        shutil.rmtree(out, ignore_errors=True)
        text = h.start("sample.py", "--prior", h.need(name, 6), "--tokenizer", h.need("phase2", 5), "--n",
                       h.size.samples, "--out", out, *h.size.options.split())
        yield f"{h.size.samples} samples of {name}, decoded", speed(text, "samples")


def miniature(h):
    """Three seeds at once: the networks are small and share the card. demo.sh goes on where it was killed."""
    runs = " ".join(shlex.quote(f"{h.runs}/demo{seed}") for seed in range(3))
    line = (f'for out in {runs}; do {h.size.demo} DEMO_SEED=${{out: -1}} DEMO_OUT=$out bash miniature/demo.sh & done; '
            f'wait; python miniature/figures.py {runs}')
    print(f"stopped after {h.args.limit} s; the same again goes on, and so does this, without a limit:", flush=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # for `python`
    text = h.start("bash", "-c", line, expect=(0, None), PATH=path)
    done = [len(list((h.runs / f"demo{seed}").glob("alpha*/*.json"))) for seed in range(3)]
    yield "evaluations of the seeds, of 12 each", {"done": done, "finished": done == [12, 12, 12]}
    yield "output", {"last_line": text.splitlines()[-1].replace("|", "/")}


PARTS = {1: versions, 2: benchmark, 3: phase1, 4: kill, 5: phase2, 6: priors, 7: samples, 8: miniature, 9: naive}


# ---------------------------------------------------------------------------------------- results and the table

def machine():
    """What the figures were measured on and with."""
    found = {"torch": torch.__version__, "torchvision": torchvision.__version__, "cuda": torch.version.cuda,
             "cudnn": torch.backends.cudnn.version(), "python": platform.python_version(), "cores": os.cpu_count(),
             "name": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"}
    if shutil.which("nvidia-smi"):
        names = "driver_version,memory.total,power.limit,clocks.max.sm"
        done = subprocess.run(["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader"], capture_output=True,
                              text=True, timeout=60)
        found |= dict(zip(names.split(","), done.stdout.split("\n")[0].split(", ")))
    return found


def run_part(h, part):
    """Run a part; its figures are on disk as soon as they are there. Returns whether it failed."""
    print(f"== part {part}: {PARTS[part].__name__}", flush=True)
    began, h.deadline, h.log = time.monotonic(), time.monotonic() + h.args.limit, h.out / f"part{part}.log"
    runtime.save_file(h.log, lambda file: None)
    result = {"part": part, "name": PARTS[part].__name__, "small": h.args.small, "failed": "", "machine": machine(),
              "vgg": h.args.vgg or "VGG16's layout, random weights: speed does not depend on the values",
              "pictures": "drawn once by data.py, read as PNG", "rows": {}}
    try:
        for name, values in PARTS[part](h):
            result["rows"][name] = values
            print(f"   {name}: {shown(values)}", flush=True)
            runtime.save_json(h.out / f"part{part}.json", result)
    except Exception as error:  # whatever it is, it must not cost the other parts their hour
        result["failed"] = str(error) if isinstance(error, Failed) else repr(error)
        print(f"part {part} FAILED: {error}\n(all output: {h.log})", flush=True)
    runtime.save_json(h.out / f"part{part}.json", result | {"seconds": round(time.monotonic() - began, 1)})
    return bool(result["failed"])


def shown(values):
    return ", ".join(f"{name} {f'{v:.0f}' if abs(v) >= 1000 else f'{v:.4g}'}" if isinstance(v, float) else f"{name} {v}"
                     for name, v in values.items())


def table(folder):
    """Print all results so far."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("part[1-9].json"))]
    if not results:
        raise runtime.BadInput(f"{folder} holds no results: run a part first")
    print("\n| part | what | result |\n|---|---|---|")
    for r in results:
        for name, values in r["rows"].items():
            print(f"| {r['part']} {r['name']} | {name} | {shown(values)} |")
        end = f"FAILED: {' / '.join(r['failed'].splitlines())}" if r["failed"] else "no error"
        where = f"{r['machine']['name']}, {'small' if r['small'] else 'paper'} sizes"
        print(f"| {r['part']} {r['name']} | {end} | {where} |")
    print(f"\nperceptual network: {results[-1]['vgg']}; pictures: {results[-1]['pictures']}")


def main():
    parser = runtime.Parser(__doc__)
    add = parser.add_argument
    add("--part", type=runtime.number(int, 0, 9), nargs="+", default=[0], help="1 to 9; 0: all but 8, in order")
    add("--table", action="store_true", help="run nothing, print the table of all results so far")
    add("--small", action=argparse.BooleanOptionalAction, default=not torch.cuda.is_available(),
        help="sizes of seconds on a CPU (default: without a GPU)")
    add("--out", default="first_hour", help="folder of results: partN.json and partN.log")
    add("--runs", default="runs/first_hour", help="folder of pictures and checkpoints, which parts share")
    add("--vgg", default="", help="perceptual network, as of train_tokenizer.py (default: VGG16, random weights)")
    add("--limit", type=runtime.positive, default=570, help="seconds after which a part is cut off")
    args = parser.parse_args()
    parts = [part for part in PARTS if part != 8] if 0 in args.part else args.part
    h = Hour(args)
    failed = [] if args.table else [str(part) for part in parts if run_part(h, part)]
    table(h.out)
    if failed:
        raise runtime.BadInput(f"failed: part {', '.join(failed)}; the table above says why")


if __name__ == "__main__":
    runtime.run(main)
