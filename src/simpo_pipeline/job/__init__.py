"""The job that an experiment runs in: its flags, its processes, its session, and `main`."""
