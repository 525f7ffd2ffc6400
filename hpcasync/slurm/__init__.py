"""Batch scripts for Slurm: what each site wants, one template, and the values a user may give."""

from hpcasync.slurm.environment import pack
from hpcasync.slurm.job import Job, check_script, mpi_plugin, render
from hpcasync.slurm.site import Site, read_site, site_names
from hpcasync.slurm.values import parse_array, parse_nodelist, parse_sweep, parse_time

__all__ = [
    "Job",
    "Site",
    "check_script",
    "mpi_plugin",
    "pack",
    "parse_array",
    "parse_nodelist",
    "parse_sweep",
    "parse_time",
    "read_site",
    "render",
    "site_names",
]
