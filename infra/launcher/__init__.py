"""A launcher for jobs on many hosts: local processes, a TPU slice, or a JobSet on GKE."""
