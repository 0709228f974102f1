"""Run the benchmark, or analyse what has run.

    PYTHONPATH=examples:benchmarks python -m evidence run --plan quick --output evidence-output
    PYTHONPATH=examples:benchmarks python -m evidence report --output evidence-output
    PYTHONPATH=examples:benchmarks python -m evidence decided

A run that is stopped goes on where it was. A GPU is used if there is one. The last command prints
at which noise the base decides what of a picture.
"""

import argparse
import os
from pathlib import Path

import torch

from evidence import plan as plans
from evidence import store
from evidence.decided import decided_table
from evidence.report import write_report
from evidence.runner import RESULTS, run_cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("run", "report", "decided"))
    parser.add_argument("--plan", choices=tuple(plans.PLANS), default="quick")
    parser.add_argument("--output", type=Path, default=Path("evidence-output"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, help="trials at a time; a CPU core each by default")
    args = parser.parse_args()
    if args.action == "decided":
        print(decided_table(args.device))
        return
    cores = len(os.sched_getaffinity(0))
    workers = args.workers or (cores if args.device == "cpu" else 1)
    plan = plans.PLANS[args.plan]
    if args.action == "run":
        torch.set_num_threads(cores)
        if len(plan.rates) > 1:
            run_cells(plans.tuning_cells(plan), args.output, args.device, "tuning", workers)
        done = store.load(args.output / RESULTS)
        cells = [*plans.equal_rate_cells(plan, done), *plans.comparison_cells(plan, done)]
        run_cells(cells, args.output, args.device, "test", workers)
    write_report(store.load(args.output / RESULTS), plan, args.output)


if __name__ == "__main__":
    main()
