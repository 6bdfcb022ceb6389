"""The process that does a reproduction's jobs: one verifier, one training or sweep after the other.

It is started by ``recurrent-drafter reproduce`` and is given a folder, which says everything else. Whatever it dies of
costs the job at hand; it is started again for the rest.
"""

import io
import os
import sys
import traceback
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

from accelerate import PartialState
from rich.progress import track

from recurrent_drafter.cli import train
from recurrent_drafter.cli.errors import reporting
from recurrent_drafter.cli.main import quiet
from recurrent_drafter.cli.train import TrainingTerminal
from recurrent_drafter.reproduce.plan import training_flags
from recurrent_drafter.reproduce.results import Results, failure
from recurrent_drafter.reproduce.workshop import Workshop

ERROR = "error.txt"  # a failed job's traceback, in its folder


@reporting
def main() -> int:
    """Do the jobs of a reproduction's folder that have no outcome yet; 1 as soon as one of them fails."""
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
        with TrainingTerminal() as terminal:
            workshop = Workshop(results, train.options, partial(track, transient=True), terminal, sys.argv)
        for name in pending:
            if os.getppid() != parent:  # killed; somebody may have started it again
                return 1
            print(f"\n[{1 + results.plan.names.index(name)} of {len(results.plan.names)}] {name}")
            results.at_work.write_text(name)
            try:
                with TrainingTerminal() as terminal:
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
    sys.exit(main())
