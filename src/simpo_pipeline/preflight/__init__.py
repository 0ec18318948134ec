"""What the programs of a job need and cost on a topology, found by compiling them for it on a machine without one."""
