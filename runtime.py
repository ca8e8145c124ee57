"""What every script needs and no model should know: processes, flags, checkpoints, run folders.

Under torchrun `setup` starts the process group; under plain python it does not, and the same lines work for one
process and for many. Gradients are averaged by hand after the backward pass (`average_gradients`): two networks
trained in turn, gradient accumulation and the double backward of R1 then need no special case.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
import traceback
import zipfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn

# ------------------------------------------------------------------------------------ ending with a sentence


class BadInput(ValueError):
    """An error that the user can fix. Its text is one sentence: what, where, what to do."""


def run(main):
    """Call `main()`. What the user can fix (BadInput, a full disk, a package to install) becomes one line on stderr
    and exit code 2, without a traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a file name that is no text must not end the run that prints it
    code = 0
    try:
        main()
        barrier()
    except (BadInput, OSError, ModuleNotFoundError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        code, text = 2, " ".join(str(error).split())
        if isinstance(error, KeyboardInterrupt):
            code, text = 130, "interrupted"
        elif isinstance(error, torch.OutOfMemoryError):
            text = f"out of GPU memory: use a smaller batch, in training --accum or --recompute ({text[:100]})"
        print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr, flush=True)
    except Exception:
        if world() == 1:
            raise
        code = 1
        traceback.print_exc()
    if world() > 1:
        # Leave without waiting for anything: after an error others may be in a collective (torchrun ends them), data
        # workers may be at work, and destroy_process_group() of gloo hangs in torch 2.6 every other time.
        sys.stdout.flush()
        os._exit(code)
    if code:
        sys.exit(code)


@contextlib.contextmanager
def explain(prefix="", errors=ValueError):
    """An error inside becomes a BadInput that begins with `prefix`: a model's ValueError about its arguments, or with
    errors=Exception whatever a foreign file's contents lead to."""
    try:
        yield
    except BadInput:
        raise
    except errors as error:
        raise BadInput(prefix + (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()) from error


# ---------------------------------------------------------------------------------------------------- flags

class Parser(argparse.ArgumentParser):
    """argparse without abbreviations (a misspelt flag must not be accepted) and with one-sentence errors."""

    def __init__(self, doc):
        super().__init__(description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise BadInput(f"{message} (--help lists the flags)")


def number(kind, low, high=math.inf, *, above=False):
    """An argparse type: a finite number of `kind` in [low, high], or in (low, high] with `above`."""
    def parse(text):
        value = kind(text)
        if not (low < value if above else low <= value) or not value <= high or value == math.inf:
            most = f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if above else 'at least'} {low}{most}")
        return value
    parse.__name__ = kind.__name__  # argparse names it where the text is no number
    return parse


count, positive, fraction = number(int, 0, 2**31 - 1), number(int, 1, 2**31 - 1), number(float, 0, 1)
decay, weight, rate = number(float, 0, 0.999999), number(float, 0), number(float, 0, above=True)
DEVICES = ["auto", "cuda", "mps", "cpu"]


def add_training_flags(parser, *, out, iters, batch_size, lr):
    """The flags that all scripts that train share (None: the script fills in its own default)."""
    add = parser.add_argument
    add("--data", help="a folder of class folders, a flat folder, torchvision:NAME, lsun:PATH, or shapes (drawn "
        "pictures); default: the data of the checkpoint that the run starts from, else shapes")
    add("--val", help="the same for validation; default: the set's own validation split, or 2 %% of --data, held out")
    add("--out", default=out, help="run folder; one that holds a checkpoint is refused unless --resume")
    add("--resume", action="store_true", help="continue from the checkpoint in --out if there is one, else start")
    add("--iters", type=positive, default=iters, help="training steps")
    add("--batch_size", type=positive, default=batch_size, help="global batch, over all processes and micro-batches")
    add("--accum", type=positive, default=1, help="micro-batches per step")
    add("--lr", type=rate, default=lr, help="learning rate")
    add("--seed", type=count, default=0, help="all randomness follows from it")
    add("--workers", type=count, default=8, help="data loading processes per training process")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on a GPU)")
    add("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="autocast; auto: bf16 on a GPU")
    add("--device", choices=DEVICES, default="auto", help="auto: cuda, then mps, then cpu")
    add("--log_every", type=positive, default=50, help="steps between two progress lines")
    add("--eval_every", type=positive, default=5000, help="steps between two validations")
    add("--save_every", type=positive, default=5000, help="steps between two checkpoints")
    add("--tensorboard", action="store_true", help="write to TensorBoard as well (needs the package)")


def micro_batch(args):
    """Images per process and micro-batch; BadInput if the global batch does not divide."""
    size, rest = divmod(args.batch_size, world() * args.accum)
    if rest:
        raise BadInput(f"--batch_size {args.batch_size} is not divisible by {world() * args.accum}, the number of "
                       f"processes times --accum")
    return size


# ------------------------------------------------------------------------------------------------ processes

def setup(args):
    """Start the process group if torchrun launched this process, resolve --device and --compile -> torch.device."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(name for name in there if there[name]) if args.device == "auto" else args.device
    if not there[name]:
        raise BadInput(f"--device {name}: this machine has none, use --device auto")
    if "RANK" in os.environ and not dist.is_initialized():
        # Two backends in one group: tensors on the GPU use nccl, flags and counts on the host use gloo. Two hours:
        # after long shared work (encoding a data set) the processes do not arrive together.
        dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo", timeout=timedelta(hours=2))
    if getattr(args, "compile", False) is None:
        args.compile = name == "cuda"
    if getattr(args, "compile", False) and not any(map(shutil.which, [os.environ.get("CXX", "g++"), "clang++"])):
        raise BadInput("torch.compile needs a C++ compiler, and this machine has none: install g++ or use --no-compile")
    device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)
    if name == "cuda":
        if device.index >= torch.cuda.device_count():
            raise BadInput(f"process {device.index} has no GPU: use --nproc_per_node={torch.cuda.device_count()}")
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
        torch.backends.cudnn.benchmark = True
    return device


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    return rank() == 0


def barrier():
    if world() > 1:
        dist.barrier()


def main_first(call):
    """call() on process 0, then on the others: the first one downloads, the others find the file."""
    if not is_main():
        barrier()
    result = call()
    if is_main():
        barrier()
    return result


def sum_over_processes(tensor):
    """Sum of `tensor` over all processes (in place; no gradient)."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def mean_over_processes(tensor):
    """Mean of `tensor` over all processes, with gradient."""
    return dist.nn.functional.all_reduce(tensor) / world() if world() > 1 else tensor


def gather_rows(tensor):
    """Concatenate the rows of all processes in order of rank (equal shapes)."""
    return torch.cat(dist.nn.functional.all_gather(tensor.contiguous())) if world() > 1 else tensor


def average_gradients(params):
    """Replace each .grad by its mean over all processes: one flat all-reduce, after the backward pass.

    DDP would overlap it with the backward pass, but it does not support R1's second derivative, and with a compiled
    model all gradients appear at once, at the end of its graph."""
    grads = [p.grad for p in params if p.grad is not None]
    if world() > 1 and grads:
        flat = sum_over_processes(torch.cat([g.reshape(-1) for g in grads])) / world()
        for grad, mean in zip(grads, flat.split([g.numel() for g in grads])):
            grad.copy_(mean.view_as(grad))


# ------------------------------------------------------------------------------------------ steps and numbers

def autocast(device, dtype):
    """bf16 autocast, or nothing for fp32. `dtype` is the flag: auto means bf16 on a GPU."""
    enabled = dtype == "bf16" or (dtype == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16) if enabled else contextlib.nullcontext()


@contextlib.contextmanager
def tf32():
    """Let fp32 products on a GPU use TF32 (10 bits of mantissa): some ten times as fast."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def cosine(step, iters, start, end):
    """Cosine decay from `start` at step 0 to `end` at step `iters`."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / iters))


class Guard:
    """Takes optimizer steps, skips those with a non-finite gradient, and gives up after twenty skipped in a row.

    The decision stays on the device: the fused Adam kernels leave weights and moments alone where `found_inf` is 1.
    Only `check`, called at log steps, waits for the device."""

    PATIENCE = 20

    def __init__(self, device):
        self.skipped, self.streak, self.worst = (torch.zeros((), device=device) for _ in range(3))

    def step(self, optimizer, lr):
        """Average the gradients, step at the rate `lr` if they are all finite, clear them. Returns their norm."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        average_gradients(params)  # NaN anywhere is NaN everywhere: all processes decide alike
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.found_inf = bad = (~norm.isfinite()).float()
        if bad.device.type != "mps" or not bad:  # the fused kernels of mps ignore found_inf
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.skipped += bad
        self.streak = (self.streak + bad) * bad
        self.worst = torch.maximum(self.worst, self.streak)
        return norm

    def check(self):
        """Number of skipped steps so far, and whether twenty came in a row (waits for the device)."""
        return int(self.skipped), int(self.worst) >= self.PATIENCE


class Averages:
    """Means of scalars over steps and processes. `add` does not wait for the device; NaN and inf are left out."""

    def __init__(self):
        self.sums = {}

    def add(self, **terms):
        for name, value in terms.items():
            value, (total, n) = value.detach().float(), self.sums.get(name, (0, 0))
            self.sums[name] = total + value.nan_to_num(0, 0, 0), n + value.isfinite()

    def means(self):
        """{name: mean since the last call}."""
        names, sums, self.sums = sorted(self.sums), self.sums, {}
        total, n = (sum_over_processes(torch.stack([sums[name][i].float() for name in names])) for i in (0, 1))
        return dict(zip(names, (total / n).tolist()))


# ---------------------------------------------------------------------------------------------------- files

def save_file(path, write):
    """Call write(file) on a temporary name, sync, rename: `path` is the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or "is the disk full?"
        left = "the previous file is intact" if path.exists() else "no part of it is left"
        raise BadInput(f"could not write {path} ({reason}), {left}: free the disk or fix the permissions and run the "
                       f"same command again (training: with --resume)") from error


def save_json(path, values):
    save_file(path, lambda file: file.write((json.dumps(values, indent=1) + "\n").encode()))


def write_npy(file, shape, dtype, parts):
    """Write the .npy array that `parts` are the rows of, one part after another: it is never in memory as a whole."""
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(file, header)
    for part in parts:
        file.write(np.ascontiguousarray(part, dtype).tobytes())


def chunks(folder, rows, size):
    """Long work as files that are each written whole (`save_file`): [(file, range of rows), ...]."""
    return [(Path(folder) / f"{i:09}.npz", range(i, min(i + size, rows))) for i in range(0, rows, size)]


def pending(chunks):
    """This process's chunks that are still to be made. A file that exists is done, also after a kill."""
    return [(file, rows) for file, rows in chunks[rank()::world()] if not file.exists()]


def sha256(path):
    """The first 8 hexadecimal digits of a file's sha256: which weights a number was measured with."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]


MAKERS = {"tokenizer": "train_tokenizer.py", "prior": "train_prior.py", "vgg": "miniature/train_vgg.py"}


def load_file(path, kind=""):
    """What torch.save wrote into a file, on the CPU: tensors, numbers and strings, nothing that can run code. With
    `kind` ("tokenizer", "prior", "vgg") it must be such a checkpoint."""
    remedy = f"; python {MAKERS[kind]} makes a {kind} checkpoint" if kind else ""
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file{remedy}")
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums
            raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything
        raise BadInput(f"{path} is damaged or holds no weights ({type(error).__name__}){remedy}") from error
    found = isinstance(state, dict) and state.get("kind")
    if kind and found != kind:
        what = f"a {found} checkpoint" if found else "something else"
        raise BadInput(f"{path} holds {what}, but a {kind} checkpoint is needed here")
    return state


# ---------------------------------------------------------------------------------------------- run folders

FREE = {"lr", "lr_end", "disc_lr", "out", "resume", "workers", "compile", "dtype", "device", "log_every", "eval_every",
        "save_every", "tensorboard", "recompute"}  # flags that may change from one start of a run to the next


class Run:
    """A run folder: ckpt.pt, metrics.jsonl, samples/. It resumes, saves, logs, and notices signals. One that holds a
    run is refused without --resume; nothing is written before `resume`."""

    def __init__(self, args, kind):
        self.args, self.kind, self.out = args, kind, Path(args.out)
        self.ckpt, self.metrics = self.out / "ckpt.pt", self.out / "metrics.jsonl"
        self.signal, self.clock, self.board = 0, None, None
        if self.ckpt.exists() and not args.resume:
            raise BadInput(f"{args.out} already holds a run: continue it with --resume, or choose another --out")

    def resume(self, **parts):
        """Fill models and optimizers (names as in `save`; None: not there) from the checkpoint, and return it; or None
        to start. From here on SIGTERM and SIGINT are handled at the end of a step (`after_step`)."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: setattr(self, "signal", number))
        state = load_file(self.ckpt, self.kind) if self.ckpt.exists() else None
        step = state["step"] if state else -1
        if (gather_rows(torch.tensor([step])) != step).any():
            raise BadInput(f"the processes do not see the same {self.ckpt}: --out must be on a disk that they share")
        if state:
            for name, value in vars(self.args).items():
                if name not in FREE and state["args"].get(name) != value:
                    raise BadInput(f"{self.ckpt} was made with {name} {state['args'].get(name)}, not {value}: give "
                                   f"the same flags to continue, or another --out to start again")
            with explain(f"{self.ckpt} does not fit the flags: ", Exception):
                for name, part in parts.items():
                    if part is not None:
                        part.load_state_dict(state[name])
        # Forget what was logged after the checkpoint, and a line that a kill cut short.
        self.lines = [line for line in read_metrics(self.metrics) if line["step"] <= step]
        if is_main():
            save_file(self.metrics, lambda file: file.write("".join(json.dumps(v) + "\n" for v in self.lines).encode()))
            if self.args.tensorboard:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(self.out)
        return state

    def missed(self, step):
        """Whether a kill came between the checkpoint of `step` and its validation."""
        logged = [line["step"] for line in self.lines if line["split"] == "val"]
        return step and self.due(step, self.args.eval_every) and step not in logged

    def save(self, step, path=None, **state):
        """Write ckpt.pt (or `path`): plain tensors, numbers and strings, readable with weights_only=True."""
        if is_main():
            if not all(value.isfinite().all() for value in state["model"].values()):
                raise BadInput(f"the weights are not finite after step {step} and are not saved: continue from the "
                               f"last checkpoint with --resume and a lower --lr")
            state = {"kind": self.kind, "args": vars(self.args), "step": step, "torch": str(torch.__version__), **state}
            save_file(path or self.ckpt, lambda file: torch.save(state, file))
        barrier()

    def log(self, step, split, **values):
        """Write one line of metrics.jsonl (and TensorBoard); return its values, numbers of six digits."""
        values = {name: float(f"{float(value):.6g}") for name, value in values.items()}
        if is_main():
            clean = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
            with open(self.metrics, "a") as file:
                file.write(json.dumps({"step": step, "split": split, **clean}) + "\n")
            if self.board:
                for name, value in values.items():
                    self.board.add_scalar(f"{split}/{name}", value, step)
                self.board.flush()
        return values

    def progress(self, step, **values):
        """Print one line: step, values, images/s since the last line, time left."""
        self.clock = self.clock or Progress(self.args.iters, "steps", done=step)
        self.clock.done = step
        text = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.clock.show(f"step {step}/{self.args.iters} | {text}", self.args.batch_size, " images")

    def due(self, step, every):
        return step % every == 0 or step == self.args.iters

    def after_step(self, step, broken, save, evaluate):
        """What is due after a step: save, leave, validate. In this order, so that a signal does not wait for a
        validation. Returns True if a signal ends the run; asking all processes for it does not wait for the GPU."""
        stop = bool(sum_over_processes(torch.tensor(self.signal)))
        if stop or broken or self.due(step, self.args.save_every):
            save(step)
        if broken:
            raise BadInput(f"{Guard.PATIENCE} steps in a row had non-finite gradients and were skipped; {self.ckpt} "
                           f"holds the last good state: continue with a lower --lr or --dtype fp32")
        if stop and is_main():
            print(f"stopped by a signal; {self.ckpt} holds step {step}, continue with --resume", flush=True)
        if not stop and self.due(step, self.args.eval_every):
            evaluate(step)
        return stop


def read_metrics(path):
    """The lines of a metrics.jsonl as dicts; a line that a kill or a full disk cut short is left out."""
    lines = []
    for line in Path(path).read_text(errors="replace").splitlines() if Path(path).exists() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            values = json.loads(line)
            lines += [values] if values["split"] and values["step"] >= 0 else []
    return lines


class Progress:
    """Progress lines of long work: `progress(n)` after n more are done; at most one line in `every_s`."""

    def __init__(self, total, what, every_s=10, done=0):
        self.total, self.what, self.every_s, self.done = total, what, every_s, done
        self.first = self.last = time.perf_counter(), done

    def __call__(self, n):
        self.done += n
        if time.perf_counter() - self.last[0] > self.every_s:
            self.show(f"{self.what}: {self.done}/{self.total}")

    def show(self, text, size=1, unit=""):
        """Print `text`, the speed since the last line (one done counts as `size`), the time left at the mean speed."""
        now, (t0, n0), (t1, n1) = time.perf_counter(), self.first, self.last
        self.last = now, self.done
        if self.done > n1:
            left = timedelta(seconds=int((self.total - self.done) * (now - t0) / (self.done - n0)))
            text += f" | {(self.done - n1) / (now - t1) * size:.1f}{unit}/s, {str(left).removeprefix('0:')} left"
        if is_main():
            print(text, flush=True)
