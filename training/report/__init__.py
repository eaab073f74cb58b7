"""A run's report: one self-contained HTML page and a few PNGs (see `training.report.write`)."""
