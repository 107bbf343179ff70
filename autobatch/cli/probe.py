"""``autobatch probe``: the largest batch of a target on a device."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import click

from autobatch.cli.accumulation import check_effective_batch, limits
from autobatch.cli.chosen import Chosen
from autobatch.cli.command import AfterDashes, command_of
from autobatch.cli.errors import traceback_option
from autobatch.cli.ranks import check_per_rank, in_job
from autobatch.cli.signals import ended_by_signals
from autobatch.cli.sweep import Sweep, parse_sweep, plot_sweep, run_sweep, sweep_json, sweep_targets
from autobatch.cli.targets import ModelOptions, Target, parse_target
from autobatch.cli.targets.common import OPTIMIZERS
from autobatch.cli.targets.hf import TASKS
from autobatch.errors import InvalidArgumentError
from autobatch.probe.command import Command
from autobatch.probe.search.arguments import check_arguments
from autobatch.units import parse_bytes

_MODEL_OPTIONS = tuple(ModelOptions.__dataclass_fields__)
_SEARCH_OPTIONS = ("start", "max_batch_size", "multiple_of", "avoid_oom", "time_limit_s")


def _bytes(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    try:
        return None if value is None else parse_bytes(int(value) if value.isdigit() else value)
    except InvalidArgumentError as exc:
        raise click.BadParameter(f"{value!r} must be {exc.allowed}") from exc


def _number(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """Not ``nan``, which is in every range."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} must be a finite number")
    return value


def _only(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> str:
    if len(values) > 1:
        raise click.BadParameter(f"one name, not {len(values)}; a command with several ranks has --count")
    return values[0] if values else "auto"


def _multiple(ctx: click.Context, param: click.Parameter, value: str) -> int | str:
    if value in ("auto", "pow2"):
        return value
    if value.isdigit() and int(value) > 0:
        return int(value)
    raise click.BadParameter(f"{value!r} must be auto, pow2 or a positive whole number")


def _writable(ctx: click.Context, param: click.Parameter, value: str | None) -> Path | None:
    """Tries to write before anything else is done. Changes nothing."""
    if value is None:
        return None
    path = Path(value)
    try:
        if path.exists():
            path.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as exc:
        raise click.BadParameter(f"{value} cannot be written: {exc.strerror}") from exc
    return path


def _picture(ctx: click.Context, param: click.Parameter, value: str | None) -> Path | None:
    if value is not None:
        from autobatch.report.plot import check_plot

        try:
            check_plot(Path(value))
        except InvalidArgumentError as exc:
            raise click.BadParameter(f"{value!r} must be {exc.allowed}") from exc
    return _writable(ctx, param, value)


@click.command(cls=AfterDashes)
@click.argument("target", required=False)
@click.option(
    "--device",
    "--gpu",
    "device",
    multiple=True,
    callback=_only,
    metavar="NAME",
    help="auto (a GPU, else another accelerator, else host memory), a torch device such as cuda:0 or cpu, or a GPU "
    "that is not there: a100-40gb, rtx-3090, memory=24GiB,capability=8.6 (`autobatch devices --virtual` lists them).",
)
@click.option(
    "--memory-limit", callback=_bytes, metavar="SIZE", help="What the workload may have at most, such as 10GiB."
)
@click.option(
    "--headroom",
    type=click.FloatRange(0, 1, max_open=True),
    callback=_number,
    default=0.05,
    show_default=True,
    metavar="FRACTION",
    help="Share of the device that is withheld from the trials and left to training; of host memory at least 0.005.",
)
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), help="bf16 and fp16 are autocast.")
@click.option("--optimizer", type=click.Choice(OPTIMIZERS), help="Of a built-in model; else adamw.")
@click.option("--grad-checkpointing", is_flag=True, help="Recompute activations instead of keeping them.")
@click.option("--compile", is_flag=True, help="Compile the model with torch.compile.")
@click.option("--mode", type=click.Choice(["train", "eval", "both"]), help="What the batch is for; else train.")
@click.option("--seq-len", type=click.IntRange(1), metavar="N", help="Tokens of a sequence, for hf:.")
@click.option(
    "--task", type=click.Choice(TASKS), metavar="TASK", help=f"For hf:, if not the usual one: {', '.join(TASKS)}."
)
@click.option("--image-size", type=click.IntRange(1), metavar="N", help="Height and width of images.")
@click.option("--start", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="First size tried.")
@click.option("--max-batch-size", type=click.IntRange(1), metavar="N", help="Try nothing larger.")
@click.option(
    "--effective-batch-size",
    type=click.IntRange(1),
    metavar="N",
    help="Samples of an optimizer step, over all ranks: trials accumulate gradients, and the answer has the plan. In a "
    "command {accumulation_steps} stands for its steps.",
)
@click.option(
    "--multiple-of",
    callback=_multiple,
    default="auto",
    metavar="auto|pow2|N",
    show_default=True,
    help="Sizes allowed: auto gives up at most 1.6 % for a round number, pow2 allows powers of two, 1 every size.",
)
@click.option("--steps", type=click.IntRange(2), default=3, show_default=True, metavar="N", help="Steps of a trial.")
@click.option(
    "--avoid-oom",
    is_flag=True,
    help="Provoke no failure, for a GPU that others use too: a virtual one of its size fails in its place, if it can; "
    "then approach from below and trust the measured memory.",
)
@click.option(
    "--time-limit",
    "time_limit_s",
    type=click.FloatRange(0, min_open=True),
    callback=_number,
    metavar="SECONDS",
    help="After that no larger size is tried.",
)
@click.option(
    "--sweep",
    multiple=True,
    callback=parse_sweep,
    metavar="OPTION=N,N,...",
    help="The largest batch at each value of seq_len or image_size, such as seq_len=512,1024,2048.",
)
@click.option(
    "--cache/--no-cache",
    default=True,
    show_default=True,
    help="Keep the answer, and confirm one that was kept by one trial instead of searching. Not with --plot.",
)
@click.option(
    "--plot",
    "plot_path",
    callback=_picture,
    metavar="FILE",
    help="Draw peak memory against batch size, or the sweep, as png, svg or pdf.",
)
@click.option(
    "--count",
    type=click.IntRange(1),
    default=1,
    metavar="N",
    help="So many of a virtual GPU, for a command with several ranks.",
)
@click.option(
    "--per-rank",
    is_flag=True,
    help="Under torchrun: a size of its own for each rank, on devices that are unequal.",
)
@click.option("--any-capability", is_flag=True, help="Also a virtual GPU for which this torch has no kernels.")
@click.option("--json", "json_path", callback=_writable, metavar="FILE", help="Write the result to this file.")
@click.option(
    "--step-within",
    "step_within_s",
    type=click.FloatRange(0, min_open=True),
    callback=_number,
    metavar="SECONDS",
    help="A command that makes no step for so long is given up; else 600.",
)
@click.option("--verbose", is_flag=True, help="Show the output of a command as it comes.")
@traceback_option
@click.pass_context
def probe(
    ctx: click.Context,
    /,
    target: str | None,
    device: str,
    any_capability: bool,
    count: int,
    sweep: Sweep | None,
    json_path: Path | None,
    plot_path: Path | None,
    step_within_s: float | None,
    verbose: bool,
    **options: Any,
) -> None:
    """Find the largest batch size of TARGET, or of a COMMAND, by training it for a few steps at several sizes.

    TARGET is a model that autobatch can make by itself, with random weights and nothing downloaded, or a function of
    yours that returns an autobatch.Workload. It is given `device`, and options by their names, if it takes them.
    COMMAND is a training command as you have it, with {batch_size} where the number goes. {scratch} in it is a folder
    that is new in each trial; {accumulation_steps} goes with --effective-batch-size.

    \b
    Targets:
      hf:gpt2, hf:bert, hf:llama, ...     an architecture of transformers
      hf:path/to/config.json              the same with your configuration
      torchvision:resnet50, timm:vit_base_patch16_224
      train.py:build, package.module:build

    \b
    Examples:
      autobatch probe hf:gpt2 --seq-len 1024 --gpu a100-40gb
      autobatch probe torchvision:resnet50 --precision fp16 --gpu memory=24GiB,capability=8.6
      autobatch probe train.py:build --device cuda:0 --json result.json
      autobatch probe train.py:build --device cpu --memory-limit 8GiB
      autobatch probe hf:gpt2 --gpu a100-40gb --sweep seq_len=256,512,1024 --plot frontier.png
      autobatch probe --gpu a100-40gb -- python train.py --batch-size {batch_size} --out {scratch}
      autobatch probe --gpu l4 --count 2 -- torchrun --nproc-per-node 2 train.py --batch-size {batch_size}
      autobatch probe hf:gpt2 --gpu a100-40gb --effective-batch-size 512
      autobatch probe --effective-batch-size 512 -- python train.py --batch {batch_size} --steps {accumulation_steps}

    Under torchrun the ranks agree on one size for TARGET, or have one each with --per-rank, and rank 0 prints it:
    `torchrun --nproc-per-node=2 -m autobatch probe TARGET`.

    \b
    Exit codes:
      0  found                          3    the device: not there, or broken
      1  not even one sample fits       4    the workload failed by itself
      2  a wrong option or name         130  interrupted, 143 terminated
                                        129  the terminal is gone, 141 the reader of the output is
    """
    model_options = ModelOptions(**{name: options.pop(name) for name in _MODEL_OPTIONS})
    effective = model_options.effective_batch_size
    check_effective_batch(effective, mode=model_options.mode, sweep=sweep)
    if options["per_rank"]:
        check_per_rank(of_command=target is None, effective_batch_size=effective, is_sweep=sweep is not None)
    about_commands = {"verbose": verbose} | ({} if step_within_s is None else {"step_within_s": step_within_s})
    command = command_of(ctx, target, model_options, count=count, about_commands=about_commands)
    options |= limits(effective, options, mode=model_options.mode)
    # A picture is drawn of the trials, and the cache has them no more. A command is nothing that it could know again.
    if not options["cache"] or command is not None or (plot_path is not None and sweep is None):
        options["cache"] = None
    check_arguments(**{name: options[name] for name in _SEARCH_OPTIONS})  # before anything is imported or shown
    with ended_by_signals(), in_job(ctx, of_command=command is not None) as job:
        options |= job.options(ctx)
        chosen = Chosen(ctx, job.device(device), any_capability, count, options, effective)
        plot_path = plot_path if job.speaks else None
        if sweep is None:
            text = _one(chosen, command or parse_target(str(target), model_options), plot_path)
        elif command is None:
            text = _several(chosen, sweep_targets(str(target), model_options, sweep), sweep, plot_path)
        else:
            raise InvalidArgumentError("sweep", sweep, "left out: it varies an option of a TARGET, not of a command")
        if json_path is not None and job.speaks:
            _write(json_path, text)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as exc:  # it could be written to before the probe
        raise InvalidArgumentError("json", str(path), f"a file that can be written ({exc.strerror})") from exc


def _one(chosen: Chosen, workload: Target | Command, plot_path: Path | None) -> str:
    place = chosen.place(workload)
    with chosen.server_ahead(workload, place):
        result = chosen.search(workload, place)
    if plot_path is not None:
        from autobatch.report.plot import plot_result

        plot_result(result, plot_path)
    return result.to_json()


def _several(chosen: Chosen, targets: list[Target], sweep: Sweep, plot_path: Path | None) -> str:
    place = chosen.place(targets[0])
    with chosen.server_ahead(targets[0], place):
        points = run_sweep(sweep, targets, lambda target, guess: chosen.search(target, place, first_guess=guess))
    if plot_path is not None:
        plot_sweep(sweep, points, targets[0].title, plot_path)
    return sweep_json(sweep, points)
