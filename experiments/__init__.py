"""One DAG a file, and what only experiments use: builders of DAGs and the settings files."""
