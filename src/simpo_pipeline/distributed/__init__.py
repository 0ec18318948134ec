"""Processes of a job, meshes, named device programs, and the ledger of program launches."""
