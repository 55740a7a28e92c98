"""The black box: a model behind `POST /predict`, and nothing else."""
