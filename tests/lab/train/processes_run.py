"""One of several processes that train the toy task; started by `processes_test`.

Arguments: folder, steps, number of processes, this one, port of the first.
"""

import os
import sys
from pathlib import Path

import optax

import quantjax as qj
from quantjax.lab.train import engine
from quantjax.lab.train.options import Options
from tests.lab.train import toy_task


def method():
    return engine.Method(optax.sgd(0.1), qj.uniform(4), qj.uniform_input(4))


def losses(total: int) -> list[tuple[int, float]]:
    """Trains and returns the loss of every step, from the first that this process takes."""
    task, found = toy_task.make(), []
    state = engine.init_state(task, toy_task.start(task), method(), seed=0)
    engine.run(
        task,
        engine.make_steps(task, method()),
        state,
        total,
        batch_size=16,
        seed=0,
        every=1,
        observe=lambda report: found.append((report.steps, report.loss)),
    )
    return found


def main(folder, total, processes, process, port, *resume):
    several = int(processes) > 1
    options = Options(
        resume=bool(resume),
        save_every=0.5,
        mesh=f"data={processes}",
        coordinator=f"localhost:{port}" if several else None,
        processes=int(processes),
        process=int(process),
    )
    with options.session(Path(folder) / "run", {}, {}):
        for step, loss in losses(int(total)):
            print(step, loss)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (ValueError, OSError) as error:  # as the command line does
        print(f"quantjax: {error}", file=sys.stderr, flush=True)
        os._exit(2)
