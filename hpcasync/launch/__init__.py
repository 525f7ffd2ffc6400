"""Starts a job of several ranks on this machine: flags of the installed MPI, shared memory, restarts."""
