"""Shared by all scripts: processes, command-line flags, run folders, checkpoints.

The same code runs in one process and, under torchrun, in many. Gradients are averaged by hand, as
in StyleGAN3's training loop: DistributedDataParallel would need special cases for R1's second
derivative and for two networks that are trained in turn.
"""
import argparse
import contextlib
import fcntl
import importlib
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

# ----------------------------------------------------------------------------- how a script ends
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


def describe(error):
    """Type and first line of an exception."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def import_optional(name):
    """Import a package that is not in requirements.txt, as only some flags need it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise SystemExit(f"the package {error.name} is not installed") from error


def ignore_signals(_):
    """worker_init_fn of a DataLoader: workers must outlive a signal until the step is done."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def kill_workers():
    """End the data workers. They ignore the SIGTERM that multiprocessing sends at exit."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report their end
    for child in multiprocessing.active_children():
        child.kill()


def launch(main):
    """Call main() and exit. Several processes do not wait for each other: after an error the others
    may be blocked in a collective, and destroy_process_group() of torch 2.6's gloo can hang."""
    code = 0
    with contextlib.suppress(AttributeError, ValueError):  # file names may not be valid text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        barrier()
    except SystemExit as error:
        code = error.code or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    except BaseException:
        if world_size() == 1:
            raise
        code = traceback.format_exc()
    finally:
        kill_workers()
    if world_size() == 1:
        sys.exit(code)
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    os._exit(code)


# ----------------------------------------------------------------------------------- processes

def setup(args):
    """Start the process group under torchrun, choose the device, print one line about both.
    Returns the torch.device and whether to compile."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else (
            "mps" if torch.backends.mps.is_available() else "cpu")
    if "RANK" in os.environ:
        # NCCL for tensors on the GPU, gloo for flags and counts on the host
        backend = "cpu:gloo,cuda:nccl" if name == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    shown = name
    if name == "cpu":
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # on a busy machine several can be 40 times slower
        shown = f"cpu, {torch.get_num_threads()} thread(s) (OMP_NUM_THREADS)"
    elif name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        shown = torch.cuda.get_device_name()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
        # cuDNN's attention has been wrong for lengths that are not multiples of 128 (NAR: 257).
        torch.backends.cuda.enable_cudnn_sdp(False)
    compiled = vars(args).get("compile", False)  # fid.py has no such flag
    compiled = name == "cuda" if compiled is None else compiled
    precision = "bf16" if is_bf16(name, vars(args).get("dtype", "fp32")) else "fp32"
    print0(f"{shown}, {precision}, {'compiled' if compiled else 'eager'}, "
           f"{world_size()} process(es)")
    return torch.device(name), compiled


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    return os.environ.get("RANK", "0") == "0"


def print0(*words):
    """Print in process 0 only."""
    try:
        if is_main():
            print(*words, flush=True)
    except OSError:  # the terminal is closed: a run must still save
        sys.stdout = open(os.devnull, "w")


def barrier():
    if world_size() > 1:
        dist.barrier()


def main_first(call):
    """call() in process 0, then in the others: the first downloads, the others find the file."""
    if not is_main():
        barrier()
    result = call()
    if is_main():
        barrier()
    return result


def broadcast(tensor):
    """Replace the tensor by that of process 0, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, 0)


def all_reduce_sum(tensor):
    """Sum over all processes, in place, without gradient."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(number):
    """The maximum of one number per process. It is reduced on the host, without a GPU sync."""
    number = torch.tensor(float(number), dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def average_gradients(grads):
    """Replace gradients by their mean over processes, in one flat all-reduce."""
    if world_size() > 1:
        flat = all_reduce_sum(torch.cat([g.reshape(-1) for g in grads])) / world_size()
        for grad, mean in zip(grads, flat.split([g.numel() for g in grads])):
            grad.copy_(mean.view_as(grad))


# --------------------------------------------------------------------------------------- flags

def at_least(minimum, kind=int):
    """An argparse type: a finite int or float >= minimum."""
    def convert(text):
        number = kind(text)
        if not minimum <= number < math.inf:
            raise argparse.ArgumentTypeError(f"must be >= {minimum}, not {text}")
        return number
    convert.__name__ = kind.__name__  # argparse: "invalid int value"
    return convert


positive_int = at_least(1)


def positive_float(text):
    """An argparse type: a finite float > 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be > 0, not {text}")
    return float(text)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Appends the default to each help string. A flag without one states it in its own text."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def parser(doc):
    """An argparse parser that accepts no abbreviated flags."""
    return argparse.ArgumentParser(description=doc, allow_abbrev=False, formatter_class=Help)


def add_device_flags(add):
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto",
        help="auto: cuda if available, then mps, then cpu")
    add("--workers", type=at_least(0), default=8, help="data loading workers per process")


def add_training_flags(parser, **defaults):
    """The flags that all training scripts share."""
    add = parser.add_argument
    add("--data", default="shapes", help="a folder of class folders, a flat folder, "
        "torchvision:NAME, lsun:PATH, or shapes (drawn); phase 2 and priors: the tokenizer's data")
    add("--val", help="validation data; default: the data's own split, or 1 image in 20, held out")
    add("--image_size", type=positive_int, default=256, help="height and width of the images")
    add("--crop", choices=("random", "resized", "center"), default="random",
        help="training crop; random: ImageNet, resized: FFHQ, center: LSUN")
    add("--out", help="run folder")
    add("--resume", action="store_true",
        help="resume the run in --out; start it if there is none")
    add("--iters", type=positive_int, help="training steps")
    add("--batch_size", type=positive_int, help="images per step, over all processes")
    add("--grad_accum", type=positive_int, default=1, help="micro-batches per step")
    add("--lr", type=positive_float, help="initial learning rate")
    add("--seed", type=at_least(0), default=0, help="random seed")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="use torch.compile; default: on a GPU only")
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto",
        help="precision; auto: bf16 on a GPU, else fp32")
    add("--log_every", type=positive_int, default=50, help="steps between two progress lines")
    add("--eval_every", type=positive_int, help="steps between two validations, each followed by a "
        "checkpoint; default: 5000, or a tenth of --iters if that is less")
    add("--tensorboard", action="store_true", help="log to TensorBoard, too")
    add_device_flags(add)
    parser.set_defaults(**defaults)


def parse_flags(parser):
    """The flags given on the command line, and the defaults of all: two dicts."""
    defaults, unset = vars(parser.parse_args([])), object()
    # argparse keeps a namespace's attributes. So a flag that is not given stays `unset`.
    found = vars(parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(defaults, unset))))
    return {name: value for name, value in found.items() if value is not unset}, defaults


def resumed_flags(given, defaults, component):
    """The flags of the run in --out, {} if there is none. Prints those that the command line
    changes. A folder that holds a run needs --resume."""
    path = Path(given.get("out", defaults["out"])) / "ckpt.pt"
    if not path.exists():
        return {}
    if not given.get("resume"):
        raise SystemExit(f"{path.parent} already holds a run: pass --resume or another --out")
    saved = load_checkpoint(path, component, mmap=True)["args"]
    saved.pop("out")  # the folder may have been moved
    for name in sorted(given.keys() & saved.keys() - {"resume"}):
        if given[name] != saved[name]:
            print0(f"note: --{name} was {saved[name]}, now {given[name]}")
    return saved


def micro_batch_size(args):
    """Images per process and micro-batch."""
    size, rest = divmod(args.batch_size, world_size() * args.grad_accum)
    if rest:
        raise SystemExit(f"--batch_size {args.batch_size} is not divisible by {world_size()} "
                         f"process(es) x --grad_accum {args.grad_accum}")
    return size


# ------------------------------------------------------------------------ precision and numbers

def is_bf16(device, dtype):
    """Whether the flag --dtype means bf16 on this device ("cuda", "cpu", ...)."""
    return dtype == "bf16" or (dtype == "auto" and device == "cuda")


def autocast(device, dtype):
    """bf16 autocast, or nothing for fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=is_bf16(device.type, dtype))


@contextlib.contextmanager
def eval_mode(model, device, dtype):
    """Run the block in eval mode, without gradients, under autocast, uncompiled (batch sizes
    differ). Then restore the mode."""
    training = model.training
    model.eval()
    with torch.no_grad(), autocast(device, dtype), torch.compiler.set_stance("force_eager"):
        yield
    model.train(training)


@contextlib.contextmanager
def tf32():
    """Let fp32 matrix products on a GPU use TF32 (10 bits of mantissa)."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def mix_seeds(*numbers):
    """One seed from several numbers, for example --seed and the step."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def cosine(step, iters, start, end):
    """Cosine decay from `start` at step 0 to `end` at step `iters`."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / iters))


class Averages:
    """Running means of scalars over steps and processes. `add` does not synchronize the device."""

    def __init__(self):
        self.terms = {}

    def add(self, **terms):
        for name, value in terms.items():
            self.terms.setdefault(name, []).append(value.detach().float())

    def pop(self):
        """{name: mean since the last call}, ignoring NaN."""
        terms, self.terms = dict(sorted(self.terms.items())), {}
        means = torch.stack([torch.stack(values).nanmean() for values in terms.values()])
        return dict(zip(terms, (all_reduce_sum(means) / world_size()).tolist()))


class Progress:
    """Prints the rate of long work and the time left. total: number of units, of which `done` were
    done before. images: images per unit. every: seconds between two lines."""

    def __init__(self, total, done=0, images=1, every=0):
        self.total, self.images, self.every = total, images, every
        self.last = time.perf_counter(), done

    def show(self, text, done):
        (before, n), now, done = self.last, time.perf_counter(), min(done, self.total)
        if not is_main() or now - before < self.every:
            return
        self.last = now, done
        if done > n:
            rate = (done - n) / (now - before)  # since the last line
            left = timedelta(seconds=int((self.total - done) / rate))
            text += f" | {rate * self.images:.1f} images/s, {left} left"
        print0(text)


# ---------------------------------------------------------------------- files and run folders

@contextlib.contextmanager
def report_full_disk(path):
    """Turn an OSError in the block into one sentence."""
    try:
        yield
    except OSError as error:
        raise SystemExit(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def replacing(path):
    """A temporary file, open for writing, that replaces `path` when the block ends without an
    error, so that `path` is never half-written."""
    temporary = Path(f"{path}.tmp")
    with report_full_disk(path):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def save_file(path, write):
    """Call write(file), and replace `path` by what it wrote."""
    with replacing(path) as file:
        try:
            write(file)
        except RuntimeError as error:  # torch.save on a full disk
            raise OSError(str(error).partition("\n")[0]) from error


def load_checkpoint(path, component, mmap=False):
    """A checkpoint of train_COMPONENT.py: a dict. mmap: tensors are read when they are used."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if state["component"] != component:
            raise ValueError(f"it holds a {state['component']}")
        if "accum" in state["args"]:
            raise ValueError("it was made before 2026-12-01: docs/running.md converts it")
    except Exception as error:
        raise SystemExit(f"{path} is not a checkpoint of train_{component}.py "
                         f"({describe(error)})") from error
    return state


def read_metrics(path):
    """The lines of a metrics.jsonl as dicts, without one that a kill cut short."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


class Run:
    """A run folder: ckpt.pt, metrics.jsonl, samples/. It resumes, saves, logs, takes optimizer
    steps and stops at a signal. shown: names of the values that progress lines show."""

    def __init__(self, args, component, shown):
        self.args, self.component, self.shown = args, component, shown
        self.out, self.board = Path(args.out), None
        self.ckpt, self.metrics = self.out / "ckpt.pt", self.out / "metrics.jsonl"
        self.skipped = self.skipped_in_a_row = 0
        self.saved = self.validated = None  # the last saved step, and the last validated one
        self.best = math.inf  # the lowest validation loss
        self.signal, self.error = 0, ""  # the first signal; why the data can't be read
        if is_main():
            with report_full_disk(self.out):
                self.out.mkdir(parents=True, exist_ok=True)
                self.lock = open(self.out / ".lock", "w")  # held until this process ends
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SystemExit(f"another process trains in {self.out}") from None
            if args.tensorboard:
                self.board = import_optional("torch.utils.tensorboard").SummaryWriter(self.out)

    def resume(self, constants, **parts):
        """Load the models and optimizers `parts` from the checkpoint, if there is one. Returns its
        step and its other keys: (0, {}) if there is none. Checkpoints hold `constants` as well, of
        which `content` is the hash of the data set."""
        self.constants, self.parts = constants, parts
        step, state = 0, {}
        if self.ckpt.exists():
            state = load_checkpoint(self.ckpt, self.component)
            try:
                for name, part in parts.items():
                    part.load_state_dict(state.pop(name))
            except (KeyError, RuntimeError, ValueError) as error:
                raise SystemExit(f"{self.ckpt} does not fit these flags "
                                 f"({describe(error)})") from error
            step = self.saved = state["step"]
            self.best, self.skipped = state.get("best", math.inf), state.get("skipped", 0)
            self.validated = state.get("validated")
            if state.get("content", constants["content"]) != constants["content"]:
                print0("warning: the data set has changed since the checkpoint")
        print0(f"{self.out} is finished: step {step}" if step >= self.args.iters else
               f"{self.out}: from step {step} to {self.args.iters}")
        if all_reduce_max(step) != -all_reduce_max(-step):
            raise SystemExit(f"{self.ckpt}: the processes read different checkpoints")
        for part in parts.values():
            # One seed can give different weights on different CPUs. Files can differ, too.
            module = isinstance(part, torch.nn.Module)
            for tensors in [part.state_dict()] if module else part.state.values():
                for tensor in tensors.values():
                    broadcast(tensor)
        if is_main():  # forget what was logged after the checkpoint
            text = "".join(json.dumps(line) + "\n" for line in read_metrics(self.metrics)
                           if state and line["step"] <= step)
            save_file(self.metrics, lambda file: file.write(text.encode()))
        self.progress = Progress(self.args.iters, step, self.args.batch_size)
        return step, state

    def save(self, step, path=None, loss=None):
        """Write a checkpoint to `path`, default ckpt.pt, unless `loss` (of the validation) or a
        weight is not finite, or the last step was skipped."""
        finite = all(w.isfinite().all() for w in self.parts["model"].parameters())
        if loss is not None and not all_reduce_max(bool(self.error)):  # no images: loss is NaN
            finite = finite and math.isfinite(loss)
        if self.skipped_in_a_row or not finite:
            text = (f"step {step} not saved: non-finite gradients, weights or loss. Last "
                    f"checkpoint: step {self.saved}")
            if step == self.args.iters:
                raise SystemExit(text)
            return print0(text)
        if is_main():
            state = {name: part.state_dict() for name, part in self.parts.items()}
            state |= self.constants | {
                "component": self.component, "args": vars(self.args), "step": step,
                "best": self.best, "validated": self.validated, "skipped": self.skipped,
                "torch": str(torch.__version__)}
            save_file(path or self.ckpt, lambda file: torch.save(state, file))
        if path is None:
            self.saved = step
        barrier()
        if self.error and step == self.args.iters:
            raise SystemExit(self.error)

    def log(self, step, split, **values):
        """Append a line to metrics.jsonl (and TensorBoard) and print the values in `shown`."""
        if not is_main():
            return
        values = {name: float(f"{float(value):.6g}") for name, value in values.items()}
        clean = {name: v if math.isfinite(v) else None for name, v in values.items()}
        with report_full_disk(self.metrics), open(self.metrics, "a") as file:  # JSON has no NaN
            file.write(json.dumps({"step": step, "split": split, **clean}) + "\n")
        for name, value in values.items() if self.board else ():
            self.board.add_scalar(f"{split}/{name}", value, step)
            self.board.flush()
        shown = " ".join(f"{n} {v:.4g}" for n, v in values.items() if n in self.shown)
        self.progress.show(f"step {step}/{self.args.iters} | {split} {shown}", step)

    def due(self, step, every):
        return step % every == 0 or step == self.args.iters

    def validation_is_due(self, step):
        """Whether to validate at `step`. A run that resumes at its last validation does not repeat
        it."""
        every = self.args.eval_every or min(5000, max(1, self.args.iters // 10))
        return self.due(step, every) and self.validated != step

    def handle_signal(self, number, _):
        """torchrun and Slurm signal every process, some of them twice, so later signals are
        ignored. Only a second Ctrl-C after 3 s exits at once."""
        if not self.signal:
            self.signal, self.signal_time = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.signal_time > 3:
            raise KeyboardInterrupt

    def stop_if_requested(self, step):
        """If a process has received a signal, save and exit with 128 + its number. If its data
        can't be read, save and exit with an error. A signal waits while steps are being skipped,
        as nothing may be saved then. Before the first call a signal ends the script."""
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup's
                signal.signal(number, self.handle_signal)
        code = int(all_reduce_max(128 + self.signal if self.signal else bool(self.error)))
        unreadable, signalled = code == 1, code > 1
        if unreadable or signalled and not self.skipped_in_a_row:
            self.save(step)
            print0(f"stopped; --resume continues from step {self.saved}")
            raise SystemExit(self.error or code)

    def step(self, optimizers, lr):
        """Average the gradients over processes, take a step of each optimizer at the learning rate
        `lr`, clear the gradients. All steps are skipped if a gradient is not finite; twenty
        skipped steps in a row end the run. Returns the gradient norm of each optimizer."""
        norms = []
        for optimizer in optimizers:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            grads = [p.grad for p in params if p.grad is not None]
            average_gradients(grads)  # a NaN anywhere is then a NaN everywhere
            norms.append(torch.nn.utils.get_total_norm(grads))
        norms = torch.stack(norms).tolist()  # the only device synchronization of a step
        finite = all(map(math.isfinite, norms))
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == 20:
            raise SystemExit(f"20 steps in a row had non-finite gradients. Last checkpoint: step "
                             f"{self.saved}. Resume with a lower --lr or with --dtype fp32")
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norms
