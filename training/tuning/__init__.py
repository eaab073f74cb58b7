"""A study: trials of hyperparameters, and the best of them.

hpo.py -> Tuner (trials) -> Study (study, lock) -> best.json (best), table, plots
"""
