"""`kto-dist launch`: a job on the hosts of a hostfile, after a look at each of them."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from kto_dist.base.errors import UserError
from kto_dist.base.secrets import masked
from kto_dist.cluster import preflight
from kto_dist.cluster.environment import forwarded, shown
from kto_dist.cluster.hostfile import Node, read
from kto_dist.cluster.launch import Plan, jobs_of, run
from kto_dist.cluster.launch import launch as supervise
from kto_dist.cluster.remote import SSH, Reach, ssh_within
from kto_dist.training.config import Config

ALLREDUCE = "kto_dist.cluster.allreduce"


@click.command(short_help="Run a job on several hosts.")
@click.option(
    "--hostfile", type=click.Path(path_type=Path), help="A line a host: `node-0 slots=8`; default: this host."
)
@click.option(
    "--job", type=click.Choice(("train", "precompute")), default="train", show_default=True, help="What to run."
)
@click.option("--dry-run", is_flag=True, help="Look at the hosts, print what would be run, and exit.")
@click.option(
    "--max-restarts", type=click.IntRange(min=0), default=0, show_default=True, help="Starts after a failure."
)
@click.option("--env", "more", multiple=True, metavar="NAME", help="Another environment variable that goes along.")
@click.option(
    "--ssh",
    show_default=shlex.join(SSH),
    metavar="COMMAND",
    help="How hosts are reached. By default with a keep-alive that fits cluster.timeout.",
)
@click.option(
    "--master-port",
    "--master_port",
    "port",
    type=click.IntRange(1, 65535),
    help="Of the first host, where ranks meet; default: one that is free there.",
)
@click.option("--preflight/--no-preflight", "looks", default=True, help="Whether hosts are looked at first.")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
def launch(
    hostfile: Path | None,
    job: str,
    dry_run: bool,
    max_restarts: int,
    more: tuple[str, ...],
    ssh: str | None,
    port: int | None,
    looks: bool,
    config: Path,
    overrides: tuple[str, ...],
) -> None:
    """Run a job on the hosts of a hostfile, after a look at each of them: training, or the reference's pass.

    Every host is reached by ssh without a password, and has this Python, CONFIG and the working directory at the same
    paths. SECTION.KEY=VALUE overrides come last and win. The environment (HF_*, NCCL_*, OMP_NUM_THREADS, ...) goes
    along without standing on any command line.

    With --max-restarts a failure that is no mistake starts the job again from its newest checkpoint, on the hosts that
    still answer, if they are cluster.min_nodes at least. SIGTERM saves and ends it, within cluster.grace seconds.
    """
    settings = Config.load(config, overrides)  # a mistake shows at once, not once the ranks have started
    reach = Reach(ssh_within(settings.cluster.timeout) if ssh is None else tuple(shlex.split(ssh)))
    plan = Plan(
        nodes=tuple(read(hostfile) if hostfile is not None else [_this_host()]),
        reach=reach,
        words=(job, str(config), *overrides),
        environment=forwarded(os.environ, more),
        folder=os.getcwd(),
        port=port or 0,
        grace=settings.cluster.grace,
        timeout=settings.cluster.timeout,
    )
    if looks:
        plan = _looked_at(plan, settings)
    elif port is None:
        plan = replace(plan, port=preflight.free_port(plan.nodes[0], reach))
    if dry_run:
        for line in _shown(plan):
            click.echo(line)
        return
    several = len(plan.nodes) > 1
    if looks and several and (status := run(replace(plan, module=ALLREDUCE, words=())).status):
        click.echo("error: the ranks of these hosts do not reach each other: see above", err=True)
        raise SystemExit(status)

    def again(plan: Plan) -> Plan | None:
        return _on_who_is_left(replace(plan, port=port or 0), settings)

    raise SystemExit(supervise(plan, restarts=max_restarts, again=again))


def _this_host() -> Node:
    import torch

    return Node(name="localhost", slots=torch.cuda.device_count() or min(2, os.cpu_count() or 1))


def _looked_at(plan: Plan, settings: Config) -> Plan:
    """With what the hosts ask for. Raises `UserError` for what is wrong with them."""
    found = preflight.look(settings, plan.nodes, plan.reach)
    for line in found.lines:
        click.echo(line)
    for doubt in found.doubts:
        click.echo(f"warning: {doubt}")
    if found.wrong:
        raise UserError("\n".join(["the hosts are not ready:", *(f"  {text}" for text in found.wrong)]))
    return replace(plan, port=plan.port or found.port, environment={**found.environment, **plan.environment})


def _on_who_is_left(plan: Plan, settings: Config) -> Plan | None:
    """The hosts that answer, if they are enough."""
    found = preflight.look(settings, plan.nodes, plan.reach)
    nodes = [node for node in plan.nodes if node.name not in found.unreachable]
    least = settings.cluster.min_nodes or len(plan.nodes)
    if len(nodes) < least:
        click.echo(
            f"error: {len(nodes)} of {len(plan.nodes)} hosts answer, and cluster.min_nodes asks for {least}: "
            f"{', '.join(found.unreachable)} do not",
            err=True,
        )
        return None
    if len(nodes) < len(plan.nodes):
        found = preflight.look(settings, nodes, plan.reach)
    if found.wrong:
        click.echo("\n".join(["error: the hosts are not ready:", *(f"  {text}" for text in found.wrong)]), err=True)
        return None
    return replace(plan, nodes=tuple(nodes), port=plan.port or found.port)


def _shown(plan: Plan) -> Sequence[str]:
    lines = ["environment that goes along:"]
    lines += [f"  {name}={value}" for name, value in shown(plan.environment).items()]
    for node, job in zip(plan.nodes, jobs_of(plan), strict=True):
        words = shlex.join(plan.reach.command(node, "kto_dist.cluster.agent"))
        ranks = f"rank {job.first}" if job.slots == 1 else f"ranks {job.first} to {job.first + job.slots - 1}"
        lines += [
            f"{node.name}: {masked(words)}",
            f"  {ranks} of {job.size}, rank 0 at {job.address}:{job.port}: "
            f"python -u -m {job.module} {masked(shlex.join(job.words))}",
        ]
    return lines
