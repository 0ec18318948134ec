"""The code of step functions. Each module is imported when its step runs, so it may import anything at its top."""
