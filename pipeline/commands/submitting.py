"""The command that takes a config to a cluster or to several machines."""

from typing import Annotated

from pipeline.commands.app import SAVES, Assignments, Config, Saves, Until, argument, command, option, planned_steps
from pipeline.views.controls import without_controls
from pipeline.views.correction import EXAMPLE


@command("Run", f"launch {EXAMPLE} --to slurm --print")
def launch(
    config: Config,
    to: Annotated[str, option("--to", metavar="TARGET", help="What starts the machines: slurm, sky or torchrun.")],
    extra: Annotated[
        list[str] | None, argument(metavar="OPTION", help="After --: options of sbatch, such as --constraint=h100.")
    ] = None,
    saves: Saves = SAVES,
    assignments: Assignments = None,
    until: Until = None,
    nodes: Annotated[
        int | None, option("--nodes", metavar="N", min=1, help="Machines; short for --set launch.machines=N.")
    ] = None,
    gpus: Annotated[
        str | None,
        option("--gpus", metavar="[KIND:]N", help="GPUs of each machine; 0 for none (default: its processes)."),
    ] = None,
    time: Annotated[str | None, option("--time", metavar="TIME", help="Slurm's limit, such as 24:00:00.")] = None,
    partition: Annotated[str | None, option("--partition", metavar="NAME", help="Slurm's partition.")] = None,
    account: Annotated[str | None, option("--account", metavar="NAME", help="Slurm's account.")] = None,
    image: Annotated[str | None, option("--image", metavar="IMAGE", help="SkyPilot's image, as docker:NAME.")] = None,
    print_only: Annotated[bool, option("--print", help="Print the job file; submit nothing.")] = False,
) -> int:
    """Write the resolved config and a short job file beside the config, and submit the job."""
    from pipeline.plan.step import refuse_plan
    from pipeline.tools import launch as launching
    from stages.model.device import planned_for

    target = launching.target(to)
    wishes = launching.Wishes(nodes, gpus, time, partition, account, image, extra or ())
    launching.check_wishes(target, wishes)
    given = [*(assignments or ()), *([f"launch.machines={nodes}"] if nodes is not None else [])]
    with planned_for(launching.gpus_of(target, wishes)):  # the machine that submits the job need not have any
        planned = planned_steps(config, saves, given, until)
    refuse_plan(planned)
    job = launching.write_job(planned, given, target, wishes, until)
    if print_only:
        print(job.text, end="")
        return 0
    for note in (*planned.notes, *job.notes):
        print(without_controls(f"note: {note}"))
    print(f"wrote {job.resolved}\nwrote {job.file}")
    if target == "torchrun":
        where = "here" if len(job.lines) == 1 else "one line on each machine"
        print(f"type {where}:", *job.lines, sep="\n  ")
    else:
        print(launching.submit(job))
    print(f"logs: {job.logs}/latest; status: pipeline status {job.resolved}")
    return 0
