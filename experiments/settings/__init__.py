"""Settings files of experiments: settings under their established names, and their conversion to step configs."""
