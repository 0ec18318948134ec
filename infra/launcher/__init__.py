"""Starts a job on many hosts: processes of this machine, a TPU slice, or a JobSet on GKE."""
