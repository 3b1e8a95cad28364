"""``etude train``: an image classifier with stochastic depth, on images of one's own or on the bundled digits."""

from __future__ import annotations

from .options import TrainOptions
from .packages import check_packages


def train(options: TrainOptions) -> None:
    """Train an image classifier with stochastic depth: on a folder of images, or on the bundled digits by default.

    Ends with a table of the results. The folder runs/<run-name> then holds the same numbers (summary.json),
    the metrics of every batch (metrics.jsonl, metrics.csv), all options (recipe.yaml), the settings and
    classes (settings.json, classes.json), the network (weights.pt), a picture of the run (run.png), and the
    newest and the best checkpoint. Ctrl-C and SIGTERM finish the running step and save; --resume continues
    from there, to a bit-identical end. On several processes: torchrun --nproc-per-node 2 -m etude train.
    """
    check_packages("train", "matplotlib", *(["sklearn"] if options.data.data == "digits" else []))
    from .dry_run import dry_run
    from .finish import finish
    from .job import build
    from .resume import announce, continuing_command, keep_options

    job = build(options)
    if options.dry_run:
        dry_run(job)
        return
    state = job.trainer.state
    if state.rank == 0:
        keep_options(job.options, job.folder, job.data.class_names)
    announce(state, job.folder)
    try:
        job.trainer.fit()
    except BaseException as stop:
        stop.add_note(f"continue it with: {continuing_command(job.folder)}")
        raise
    job.trainer.close()
    if state.rank == 0:
        finish(job)
