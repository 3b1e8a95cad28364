"""The end of a training: the network in a file, and the results."""

from .job import Job
from .report import report
from .trained import Recorded, record_depth, save_trained


def finish(job: Job) -> None:
    """Write the network and the results of a finished training to its folder, and print them."""
    plan = None if job.stochastic_depth is None else job.stochastic_depth.plan
    recorded = Recorded(
        model=job.options.model.model,
        class_names=job.data.class_names,
        image_size=job.data.image_size,
        resize_size=job.resize_size,
        mean=job.data.mean,
        std=job.data.std,
        blurpool=job.options.regularization.blurpool,
        **record_depth(plan, job.options.depth.drop_unit),
    )
    save_trained(job.folder, job.averaged_network(), recorded)
    report(job)
