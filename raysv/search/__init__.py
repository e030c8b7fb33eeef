"""Search space in, best config out: only here Ray, Optuna and MLflow."""
