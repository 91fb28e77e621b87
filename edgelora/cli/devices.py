"""`edgelora devices`: list, show, detect."""

import json
from dataclasses import asdict
from typing import Any

import click

from edgelora.cli.console import out, show_columns
from edgelora.cli.parameters import json_option
from edgelora.device import DeviceProfile, list_profiles, load_profile
from edgelora.device import detect as detect_device

GIGA = 1e9


@click.group(invoke_without_command=True)
@click.pass_context
def devices(ctx: click.Context) -> None:
    """Profiles of devices, and the machine at hand.

    \b
    Example:  edgelora devices show raspberry-pi-5
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_devices)


@devices.command("list")
@json_option
def list_devices(*, as_json: bool = False) -> None:
    """The profiles that `export --device` knows.

    \b
    Example:  edgelora devices list
    """
    profiles = list_profiles()
    if as_json:
        _print_json([asdict(profile) for profile in profiles])
        return
    head = ("id", "name", "isa", "memory", "read by the cores")
    rows = [(profile.id, profile.name, profile.isa, *_sizes(profile)) for profile in profiles]
    show_columns([head, *rows])


@devices.command()
@click.argument("profile_id", metavar="ID")
@json_option
def show(profile_id: str, *, as_json: bool) -> None:
    """One profile with the source of each figure.

    \b
    Example:  edgelora devices show raspberry-pi-5
    """
    profile = load_profile(profile_id)
    if as_json:
        _print_json(asdict(profile))
        return
    memory, bandwidth = _sizes(profile)
    out.print(f"{profile.id}: {profile.name}, {profile.isa}, {memory}, {bandwidth}")
    for cluster in profile.cores:
        kind = "performance" if cluster.performance else "efficiency"
        out.print(
            f"cores   {cluster.count} × {cluster.microarchitecture}, {cluster.max_ghz} GHz, {kind}"
        )
    for source in profile.sources:
        said = source.estimate or f"{source.title} {source.url}"
        out.print(f"source  {source.figure}: {said}")


@devices.command()
@json_option
def detect(*, as_json: bool) -> None:
    """The machine this runs on, its memory bandwidth measured (half a second).

    \b
    Example:  edgelora devices detect --json
    """
    found = asdict(detect_device())
    if as_json:
        _print_json(found)
        return
    for name, value in found.items():
        out.print(f"{name:30}{'unknown' if value is None else value}")


def _sizes(profile: DeviceProfile) -> tuple[str, str]:
    sustained = profile.bandwidth_bytes_per_second.sustained
    return f"{profile.memory_bytes / 2**30:g} GiB", f"{sustained / GIGA:.1f} GB/s"


def _print_json(fields: Any) -> None:
    out.print_json(json.dumps(fields))
