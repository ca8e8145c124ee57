"""What every script needs and no model should know: processes, flags, run folders.

Under torchrun `setup` starts the process group, under plain python it does not, and the same lines
work for one process and for many. Gradients are averaged by hand after the backward pass: two
networks trained in turn, gradient accumulation and R1 then need no special case.
"""
import argparse
import contextlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import sysconfig
import time
import traceback
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ------------------------------------------------------------------------------- how a script ends
# A signal asks a run to finish its step, save and leave. Terminals, torchrun and Slurm signal every
# process, some of them twice: what comes later is the same request. Only a person's Ctrl-C, seconds
# later, ends at once. Data workers ignore signals; they end with their parent, whatever ends it.

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
           if hasattr(signal, name)]


class Request:
    """The first signal that came, `number`, or 0."""

    def __init__(self):
        self.number, self.when = 0, 0.0
        for number in SIGNALS:
            # nohup has SIGHUP ignored, and that must stay
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.come)

    def come(self, number, _):
        if not self.number:
            self.number, self.when = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.when > 3:
            raise KeyboardInterrupt


def in_worker(_):
    """For the start of a data worker."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def end_workers():
    """What data.loader has multiprocessing call at exit, before it asks workers to end by a SIGTERM
    and waits for them: they ignore it."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers and hasattr(signal, "SIGCHLD"):  # torch's handler would report their end
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        worker.kill()


def launch(main):
    """Call main(). Several processes leave without waiting for each other: after an error others
    may be in a collective, and destroy_process_group() of gloo hangs now and then in torch 2.6."""
    code = 0
    for stream in (sys.stdout, sys.stderr):  # names of files and classes may be no text
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
        barrier()
    except BaseException as error:
        if world() == 1:
            raise
        code = error.code if isinstance(error, SystemExit) else traceback.format_exc()
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    if world() > 1:
        end_workers()
        sys.stdout.flush()
        os._exit(code)


# ----------------------------------------------------------------------------------- processes

def setup(args):
    """Start the process group if torchrun launched this process, switch TF32 off, print the first
    line. Returns the torch.device, and whether to compile."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    name = next(n for n in there if there[n]) if args.device == "auto" else args.device
    if not there[name]:
        raise SystemExit(f"--device {name}: this machine has none")
    if "RANK" in os.environ:
        # Tensors on the GPU use nccl, flags and counts on the host gloo. Two hours: after encoding
        # a data set the processes do not arrive together.
        backend = "cpu:gloo,cuda:nccl" if name == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    wanted = vars(args).get("compile", False)  # fid.py has no such flag
    compiled = name == "cuda" if wanted is None else wanted
    if compiled and (missing := missing_for_compile(name)):
        if wanted:
            raise SystemExit(f"--compile needs {missing}, which this machine lacks")
        compiled = False
        if is_main():
            print(f"not compiled, since this machine lacks {missing}", flush=True)
    if is_main():
        print(describe(name, args, compiled), flush=True)
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
        # Some versions of torch prefer cuDNN's attention on an H100. It has had faults where a
        # length is no multiple of 128, as NAR's 257.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device(name), compiled


def missing_for_compile(device):
    """What torch.compile needs and this machine lacks, or ""."""
    variable, *names = (("CC", "gcc", "cc", "clang") if device == "cuda" else
                        ("CXX", "g++", "c++", "clang++"))
    if not shutil.which(os.environ.get(variable, "")) and not any(map(shutil.which, names)):
        return f"a compiler ({names[0]})"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python.h (in Debian's and Ubuntu's package python3-dev)"
    return ""


def describe(device, args, compiled):
    """The first line of a run: on what it runs, and how."""
    text = torch.cuda.get_device_name() if device == "cuda" else device
    if device == "cpu" and args.device == "auto":
        text += " (torch finds no GPU)"
    text += ", bf16" if is_bf16(device, vars(args).get("dtype", "fp32")) else ", fp32"
    text += ", compiled" if compiled else ", eager"
    text += f", {world()} process{'es' * (world() > 1)}"
    if "accum" in vars(args):
        text += f", {micro_batch(args)} images at once in each"
    return text


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    return os.environ.get("RANK", "0") == "0"


def barrier():
    if world() > 1:
        dist.barrier()


def on_one_machine(what):
    """Refuse several machines: of pages that two of them map of one file on a network disk, one
    machine's may be lost."""
    if int(os.environ.get("LOCAL_WORLD_SIZE", world())) < world():
        raise SystemExit(f"{what} on one machine, please: with several see docs/running.md")


def main_first(call):
    """call() on process 0, then on the others: the first downloads, the others find the file."""
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


def largest_over_processes(number):
    """The largest of all processes' numbers (asking does not wait for the GPU)."""
    largest = torch.tensor(number, dtype=torch.float64)
    if world() > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def mean_over_processes(tensor):
    """Mean of `tensor` over all processes. Its gradient is that of each process's own tensor, and
    `average_gradients` takes their mean."""
    mean = sum_over_processes(tensor.detach().clone()) / world()
    return mean + tensor - tensor.detach()


def gather_rows(tensor):
    """Concatenate the rows of all processes in order of rank (equal shapes, no gradient)."""
    if world() == 1:
        return tensor
    rows = [torch.empty_like(tensor) for _ in range(world())]
    dist.all_gather(rows, tensor.contiguous())
    return torch.cat(rows)


def average_gradients(grads):
    """Replace each by its mean over all processes: one flat all-reduce, after the backward pass.

    DDP would overlap it with the backward pass, but does not know R1's, and in a compiled model all
    gradients appear at once, at the end of its graph."""
    if world() > 1:
        flat = sum_over_processes(torch.cat([g.reshape(-1) for g in grads])) / world()
        for grad, mean in zip(grads, flat.split([g.numel() for g in grads])):
            grad.copy_(mean.view_as(grad))


# --------------------------------------------------------------------------------------- flags

def at_least_1(text):
    """A flag's type. argparse then says "invalid at_least_1 value"."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def above_0(text):
    """A flag's type."""
    if not 0 < float(text) < math.inf:
        raise ValueError
    return float(text)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows every default. A flag without one says in its text where its value comes from."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, "") else super()._get_help_string(action)


def parser(doc):
    """An argparse parser without abbreviations: a misspelt flag must not be accepted."""
    return argparse.ArgumentParser(description=doc, allow_abbrev=False, formatter_class=Help)


def add_device_flags(add):
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto",
        help="auto: cuda, then mps, then cpu")
    add("--workers", type=int, default=8, help="data loading processes per process")


def add_training_flags(parser, **defaults):
    """The flags that all scripts that train share."""
    add = parser.add_argument
    add("--data", help="a folder of class folders, a flat folder, torchvision:NAME, lsun:PATH, or "
        "shapes (drawn pictures); default: that of the tokenizer it starts from, else shapes")
    add("--val", help="the same for validation; default: the set's own validation part, or a part "
        "of --data, held out")
    add("--image_size", type=at_least_1, default=256, help="side of the images, which are square")
    add("--crop", choices=("random", "resized", "center"), default="random",
        help="random: ImageNet, resized: FFHQ, center: LSUN")
    add("--out", help="run folder; one that holds a run is refused unless --resume")
    add("--resume", action="store_true",
        help="go on from the checkpoint in --out, with its flags, if there is one, else start")
    add("--iters", type=at_least_1, help="training steps")
    add("--batch_size", type=at_least_1, help="global batch, over all processes and micro-batches")
    add("--accum", type=at_least_1, default=1, help="micro-batches per step")
    add("--lr", type=above_0, help="learning rate")
    add("--seed", type=int, default=0, help="all randomness follows from it")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on a GPU")
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 on a GPU")
    add("--log_every", type=at_least_1, default=50, help="steps between two progress lines")
    add("--eval_every", type=at_least_1, default=5000,
        help="steps between two validations, each followed by a checkpoint")
    add("--tensorboard", action="store_true",
        help="write to TensorBoard as well, which pip install tensorboard brings")
    add_device_flags(add)
    parser.set_defaults(data_found="", **defaults)  # what the data were: no flag, kept with them


def read_flags(parser):
    """What the command line gives, and every flag's default: two dicts {name: value}."""
    defaults = vars(parser.parse_args([]))
    unset = object()
    found = vars(parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(defaults, unset))))
    return {name: value for name, value in found.items() if value is not unset}, defaults


def resumed_flags(flags, given, component, fixed):
    """The flags of the run in flags["out"] if there is one to go on with, else {}. Those that are
    `given` anew are named, and refused if they are `fixed` while a run goes on."""
    path = Path(flags["out"]) / "ckpt.pt"
    if not path.exists():
        return {}
    if not flags["resume"]:
        raise SystemExit(f"{path.parent} already holds a run: --resume, or choose another --out")
    state = read_checkpoint(path, component, mmap=True)
    saved = {name: value for name, value in state["args"].items() if name in flags}
    if given.get("iters", saved["iters"]) < state["step"]:
        raise SystemExit(f"{path} is at step {state['step']}, beyond --iters {given['iters']}")
    for name in sorted(given.keys() & saved.keys() - {"out", "resume"}):
        old, new = saved[name], given[name]
        if new != old and name in fixed:
            raise SystemExit(f"{path} was made with --{name} {old}, and can't go on with {new}: "
                             f"leave the flag out, or choose another --out")
        if new != old and is_main():
            note = ", and the learning rate's schedule is stretched" if name == "iters" else ""
            print(f"--{name} was {old}, now {new}{note}", flush=True)
    return saved | {"out": flags["out"], "resume": True}


def inherited_flags(saved, names, given):
    """Of the flags of the tokenizer that a run starts from those of `names`, as far as it knows
    them. Its --val goes with its --data alone."""
    return {name: saved[name] for name in names if name in saved
            and not (name == "val" and "data" in given)}


def micro_batch(args):
    """Images per process and micro-batch."""
    size, rest = divmod(args.batch_size, world() * args.accum)
    if rest:
        raise SystemExit(f"--batch_size {args.batch_size} is not divisible by {world()} processes "
                         f"times --accum {args.accum}")
    return size


# ---------------------------------------------------------------------- optimizers and numbers

def is_bf16(device, dtype):
    """`dtype` is the flag: auto means bf16 on a GPU."""
    return dtype == "bf16" or (dtype == "auto" and device == "cuda")


def autocast(device, dtype):
    """bf16 autocast, or nothing for fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=is_bf16(device.type, dtype))


@contextlib.contextmanager
def evaluating(model, device, dtype, eager=False):
    """Eval mode, no gradient, autocast; then the mode before. eager: no graph is compiled."""
    stance, training = "force_eager" if eager else "default", model.training
    model.eval()
    with torch.no_grad(), autocast(device, dtype), torch.compiler.set_stance(stance):
        yield
    model.train(training)


@contextlib.contextmanager
def tf32():
    """Let fp32 products on a GPU use TF32 (10 bits of mantissa): some ten times as fast."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def seed_of(*numbers):
    """One seed from several numbers, say --seed and the step."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def cosine(step, iters, start, end):
    """Cosine decay from `start` at step 0 to `end` at step `iters`."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / iters))


class Averages:
    """Means of scalars over steps and processes. `add` does not wait for the device."""

    def __init__(self):
        self.terms = {}

    def add(self, **terms):
        for name, value in terms.items():
            self.terms.setdefault(name, []).append(value.detach().float())

    def means(self):
        """{name: mean since the last call}; NaN is left out."""
        terms, self.terms = dict(sorted(self.terms.items())), {}
        means = torch.stack([torch.stack(values).nanmean() for values in terms.values()])
        return dict(zip(terms, (sum_over_processes(means) / world()).tolist()))


# --------------------------------------------------------------------------------- run folders

def save_file(path, write):
    """Call write(file) on a temporary name, sync, rename: `path` is the old or the new file."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, (OSError, RuntimeError)):  # of a full disk torch.save says the latter
            refuse_to_write(path, error)
        raise


def refuse_to_write(path, error):
    """What can't be written, why, and how much room there is."""
    there = next(folder for folder in Path(path).absolute().parents if folder.exists())
    reason = str(error).partition("\n")[0]
    raise SystemExit(f"{path} can't be written ({type(error).__name__}: {reason}); "
                     f"{shutil.disk_usage(there).free >> 20} MiB are free there") from error


def create_array(path, shape, dtype):
    """A new memory-mapped .npy of zeros. Its room on the disk is taken at once: where none is left
    for a page of a sparse file, the process dies of a bus error hours later."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        array = np.lib.format.open_memmap(path, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):  # not on a Mac
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        refuse_to_write(path, error)
    return array


def read_checkpoint(path, component, mmap=False):
    """A checkpoint of train_COMPONENT.py. mmap: what is not looked at is not read."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if state["component"] != component:
            raise ValueError(f"it holds a {state['component']}")
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise SystemExit(f"{path} is no checkpoint of train_{component}.py ({reason})") from error
    return state


def read_metrics(path):
    """The lines of a metrics.jsonl as dicts, without one that a kill cut short."""
    lines = []
    for line in Path(path).read_text().splitlines() if Path(path).exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


class Run:
    """A run folder: ckpt.pt, metrics.jsonl, samples/. It resumes, saves, logs, and knows when to
    stop. Two runs can't have one folder.

    shown: names of the values that a progress line shows."""

    def __init__(self, args, component, shown):
        self.args, self.component, self.shown = args, component, shown
        self.out, self.saved, self.code, self.reason = Path(args.out), 0, 0, ""
        self.ckpt, self.metrics = self.out / "ckpt.pt", self.out / "metrics.jsonl"
        self.board = None
        if is_main():
            try:
                self.out.mkdir(parents=True, exist_ok=True)
                self.lock = open(self.out / ".lock", "w")  # held until this process ends
                if fcntl:
                    fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SystemExit(f"another process trains in {self.out}") from None
            except OSError as error:
                refuse_to_write(self.out, error)
            if args.tensorboard:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(self.out)

    def resume(self, **parts):
        """Fill models and optimizers (names as in `save`) from the checkpoint, if there is one, and
        return its step, or 0. What was logged later is forgotten. From here on a signal is a
        request."""
        self.request = Request()
        if self.ckpt.exists():
            state = read_checkpoint(self.ckpt, self.component)
            self.saved = state["step"]
            try:
                for name, part in parts.items():
                    part.load_state_dict(state[name])
            except (KeyError, RuntimeError, ValueError) as error:
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                raise SystemExit(f"{self.ckpt} does not fit these flags ({reason}): leave them "
                                 f"out, or choose another --out") from error
        for part in parts.values() if world() > 1 else ():  # equal seeds make equal weights on
            if isinstance(part, torch.nn.Module):  # equal processors: here process 0's are taken
                for tensor in part.state_dict().values():
                    dist.broadcast(tensor, 0)
        self.lines = [line for line in read_metrics(self.metrics) if line["step"] <= self.saved]
        self.progress = Progress(self.args.iters, self.saved)
        if is_main():
            text = "".join(json.dumps(line) + "\n" for line in self.lines)
            save_file(self.metrics, lambda file: file.write(text.encode()))
            if self.saved == self.args.iters:
                print(f"{self.out} is finished: step {self.saved} of {self.saved}", flush=True)
            elif self.saved:
                print(f"going on from step {self.saved} of {self.args.iters} in {self.out}",
                      flush=True)
            elif self.args.resume:
                print(f"nothing to go on from in {self.out}: it starts", flush=True)
        return self.saved

    def save(self, step, path, **state):
        """Write a checkpoint: tensors, numbers and strings, with the flags."""
        if is_main():
            state |= {"component": self.component, "args": vars(self.args), "step": step,
                      "torch": str(torch.__version__)}
            save_file(path, lambda file: torch.save(state, file))
        self.saved = step if path == self.ckpt else self.saved
        barrier()

    def log(self, step, split, **values):
        """Write a line of metrics.jsonl (and TensorBoard), print the values to be shown."""
        values = {name: float(f"{float(value):.6g}") for name, value in values.items()}
        if is_main():
            clean = {name: v if math.isfinite(v) else None for name, v in values.items()}
            with open(self.metrics, "a") as file:  # JSON has no NaN
                file.write(json.dumps({"step": step, "split": split, **clean}) + "\n")
            if self.board:
                for name, value in values.items():
                    self.board.add_scalar(f"{split}/{name}", value, step)
                self.board.flush()
            shown = " ".join(f"{n} {v:.4g}" for n, v in values.items() if n in self.shown)
            text = f"step {step}/{self.args.iters} | {split} {shown}"
            self.progress.show(text, step, self.args.batch_size)

    def due(self, step, every):
        return step % every == 0 or step == self.args.iters

    # In both process 0 decides: on a network disk the others may not see all lines yet.

    def missed(self, step):
        """Whether a run that goes on at `step` was stopped or killed before its validation."""
        logged = any(line["step"] == step and line["split"] == "val" for line in self.lines)
        due = step > 0 and self.due(step, self.args.eval_every)
        return largest_over_processes(is_main() and due and not logged) > 0

    def lowest(self):
        """The lowest validation loss so far, or infinity."""
        losses = [line["loss"] for line in self.lines if line["split"] == "val"]
        lowest = min((loss for loss in losses if loss is not None), default=math.inf)
        return -largest_over_processes(-lowest if is_main() else -math.inf)

    def stopping(self, reason=""):
        """Whether a signal has come to any process, or one of them has another reason to stop."""
        self.reason = reason
        number = self.request.number
        self.code = int(largest_over_processes(128 + number if number else bool(reason)))
        return self.code > 0

    def leave(self):
        """End the script after `stopping`: by 128 + signal, so that a chain of commands ends."""
        if is_main():
            print(f"stopped; --resume goes on from step {self.saved}" if self.saved else
                  "stopped before anything was saved", flush=True)
        raise SystemExit(self.reason or self.code)


class Optimizers:
    """Steps of all optimizers, skipped where a gradient is not finite; twenty in a row end the
    run."""

    def __init__(self, run, *optimizers):
        self.run, self.optimizers, self.skipped, self.in_a_row = run, optimizers, 0, 0

    def step(self, lr):
        """Average the gradients over processes, step at the rate `lr`, clear them. Returns the
        gradient norm of each optimizer."""
        norms = []
        for optimizer in self.optimizers:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            grads = [p.grad for p in params if p.grad is not None]
            average_gradients(grads)  # NaN anywhere is NaN everywhere: all processes decide alike
            norms.append(torch.nn.utils.get_total_norm(grads))
        norms = torch.stack(norms).tolist()  # the one wait for the device in a step
        finite = all(map(math.isfinite, norms))
        self.skipped += not finite
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if self.in_a_row == 20:
            then = (f"{self.run.ckpt} holds step {self.run.saved}: go on with --resume and"
                    if self.run.saved else f"{self.run.ckpt} is not there yet: start again with")
            raise SystemExit(f"20 steps in a row had non-finite gradients and were skipped; {then} "
                             f"a lower --lr, or --dtype fp32")
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norms

    def sound(self, step, output):
        """Whether the weights may replace the last ones on disk: `output`, what they now make of a
        batch, is finite in every process, and no step is being skipped. If not, it is said."""
        finite = not largest_over_processes(not output.isfinite().all())
        if finite and (not self.in_a_row or step == self.run.args.iters):
            return True
        text = f"step {step} is not saved, since its numbers are not finite"
        if step == self.run.args.iters:
            raise SystemExit(f"{text}: the last that were are of step {self.run.saved}")
        if is_main():
            print(text, flush=True)
        return False


class Progress:
    """Lines with the rate and the time left of long work, `total` units, `done` at the start."""

    def __init__(self, total, done=0):
        self.total, self.first, self.last = total, (time.perf_counter(), done), (0, done)

    def show(self, text, done, images=1, every_s=0):
        """Print `text`, the rate since the last line (a unit is so many images), the time left; at
        most one line in `every_s` seconds."""
        now, (t0, n0), (t1, n1) = time.perf_counter(), self.first, self.last
        done = min(done, self.total)  # the last process may have fewer
        if not is_main() or now - t1 < every_s:
            return
        t1, self.last = t1 or t0, (now, done)
        if done > n1:
            left = timedelta(seconds=int((self.total - done) * (now - t0) / (done - n0)))
            text += f" | {(done - n1) / (now - t1) * images:.1f} images/s, {left} left"
        print(text, flush=True)
