"""What every experiment runs inside: its flags, the processes of the job, the session and `main`."""
