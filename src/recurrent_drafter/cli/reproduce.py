"""``experiment_paper_reproduction.py`` and ``recurrent-drafter reproduce``: the paper's comparisons by one command."""

import io
import os
import shlex
import signal
import subprocess
import sys
import traceback
from contextlib import redirect_stdout
from pathlib import Path

from accelerate import PartialState

from recurrent_drafter.cli import train
from recurrent_drafter.cli.main import INTERRUPTED, quiet, reporting
from recurrent_drafter.cli.progress import tracked
from recurrent_drafter.cli.train import TrainingTerminal, duration
from recurrent_drafter.data.sources import Split, load_dialogues
from recurrent_drafter.records.paths import make_writable
from recurrent_drafter.records.provenance import provenance
from recurrent_drafter.report.reproduction import write_report
from recurrent_drafter.reproduce.plan import ReproduceOptions, Source, training_flags
from recurrent_drafter.reproduce.results import Results, failure
from recurrent_drafter.reproduce.workshop import Workshop

REFUSED = 2
ERROR = "error.txt"  # a failed job's traceback, in its folder


def run(options: ReproduceOptions, *, argv: list[str]) -> int:
    results = Results.of(options)
    check(results)
    print("\n".join(outline(results)), flush=True)  # before other processes write
    if options.dry_run:
        return 0
    make_writable(results.folder)
    results.claim()
    results.retry()
    command = ["python", "experiment_paper_reproduction.py", *argv]
    made = provenance(command)
    code = do_jobs(results)
    if code == REFUSED:
        return REFUSED
    for path in write_report(results, made):
        print(path)
    if code == 0 and (failed := [name for name in results.plan.names if results.failed(name)]):
        print(f"{len(failed)} of {len(results.plan.names)} jobs have failed: {', '.join(failed)}", file=sys.stderr)
        return 1
    return code


def check(results: Results) -> None:
    """Raise now what would fail later: flags that do not fit a training, data that cannot be read.

    Sets by name, which may have to be downloaded, are not looked at for a dry run.
    """
    options = results.options
    for cell in results.plan.cells:
        train.options(training_flags(cell, options, results.path(cell.name)))
    splits: list[tuple[Source, Split]] = [(source, "train") for source in options.training_sets]
    splits += [(source, source.held_out_split(options.training_sets)) for source in options.evaluation_sets]
    for source, split in splits:
        if source.path or not options.dry_run:
            load_dialogues(source.name, source.path, split, limit=1)


def outline(results: Results) -> list[str]:
    options, plan = results.options, results.plan
    trained, evaluated = (
        ", ".join(source.label for source in sets) for sets in (options.training_sets, options.evaluation_sets)
    )
    seeds = " ".join(map(str, options.seeds))
    stores = {(cell.training_set, cell.scope) for cell in plan.cells if cell.method == "distilled"}
    return [
        f"{len(plan.cells)} trainings of drafters for {options.llm_name_or_path}: methods {' '.join(options.methods)}; "
        f"scopes {' '.join(options.scopes)}; on {trained}; seeds {seeds}",
        *(f"  {name}" for name in plan.names if options.dry_run),
        f"each learns from {options.max_examples:,} conversations at most and is evaluated along "
        f"{options.eval_max_examples} replies at most of each of: {evaluated}",
        f"sweeps with the last drafter: {', '.join(plan.sweeps) or 'none'}",
        f"cost: {cost(results)}; besides, {len(stores)} x {options.max_examples:,} conversations at most are distilled",
    ]


def cost(results: Results) -> str:
    """What is left to do, in time where that is known."""
    options, plan = results.options, results.plan
    finished = {record["name"]: record["seconds"] for record in results.records if record["status"] == "finished"}
    left = sum(cell.name not in finished for cell in plan.cells)
    done = f"{len(finished)} of {len(plan.names)} jobs are finished; "
    trained = [finished[cell.name] for cell in plan.cells if cell.name in finished]
    if trained:
        mean = sum(trained) / len(trained)
        return f"{done}{left} trainings are left, {duration(left * mean)} at {duration(mean)} each as so far"
    if options.cell_seconds is None:
        return f"{left} trainings by epochs; train_speculator.py --estimate measures what one of them takes here"
    return f"{left} trainings of about {options.cell_seconds:g} seconds: {duration(left * options.cell_seconds)}"


def do_jobs(results: Results) -> int:
    """Do what has no outcome yet, in processes of their own; how it ended: 0 done, 2 nothing could begin, 130."""
    launcher = shlex.split(results.options.launcher) or [sys.executable]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, and the worker with it
    while results.pending:
        results.at_work.unlink(missing_ok=True)
        with subprocess.Popen([*launcher, "-m", "recurrent_drafter.cli.reproduce", str(results.folder)]) as worker:
            try:
                code = worker.wait()
            except KeyboardInterrupt:
                worker.send_signal(signal.SIGINT)
                code = worker.wait() and INTERRUPTED
        if code == INTERRUPTED:
            print("interrupted: run the same command again, it goes on after the last finished job", file=sys.stderr)
            return INTERRUPTED
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if code == REFUSED and not results.at_work.exists():
            return REFUSED  # the worker has said why
        if code != 0 and not results.at_work.exists():
            raise OSError(f"the process that trains ended with {how} before its first job (see above)")
        if code != 0 and results.record(died := results.at_work.read_text()) is None:
            results.write(died, failure(f"the process that did it ended with {how}"))
    return 0


@reporting
def work() -> int:
    """Do the jobs of a reproduction's folder that have no outcome yet; 1 as soon as one of them fails.

    The process has one verifier, and is given the folder, which says everything else. Whatever it dies of costs the job
    at hand; `do_jobs` starts it again for the rest.
    """
    (folder,) = sys.argv[1:]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log file shows what is going on
    quiet()
    results = Results.from_folder(Path(folder))
    # The trainings' own arguments decide how processes are joined (--use_cpu), and `PartialState` is what they made.
    rank = train.options(training_flags(results.plan.showcase, results.options, results.folder)).process_index
    state = PartialState()
    parent, pending = os.getppid(), results.pending
    state.wait_for_everyone()  # before one of several processes changes what is pending
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank > 0 else sys.stdout):
        with TrainingTerminal(speaks=rank == 0) as terminal:
            workshop = Workshop(results, train.options, tracked, terminal, sys.argv)
        for name in pending:
            if os.getppid() != parent:  # killed; somebody may have started it again
                return 1
            print(f"\n[{1 + results.plan.names.index(name)} of {len(results.plan.names)}] {name}")
            results.at_work.write_text(name)
            try:
                with TrainingTerminal(speaks=rank == 0) as terminal:
                    record = workshop.do(name, terminal, terminal.should_stop)
            except Exception as error:  # noqa: BLE001  whatever a job dies of is its outcome
                results.path(name).mkdir(parents=True, exist_ok=True)
                (results.path(name) / ERROR).write_text(traceback.format_exc())
                results.write(name, failure(" ".join(f"{type(error).__name__}: {error}".split())))
                return 1
            if state.is_main_process:
                results.write(name, record)
    return 0


if __name__ == "__main__":
    sys.exit(work())
