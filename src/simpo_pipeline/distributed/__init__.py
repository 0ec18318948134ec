"""Processes, meshes, named device programs and the ledger of their launches."""
