"""Debugging of a training run: what is seen of it, and rules that find its diseases.

    Observer ──> Observation ──> rules ──> verdicts (rules.json)
    observations.jsonl ──┘          │
    smdebug's out_dir ──────────────┘

The rules are those of SageMaker Debugger, by its names and parameters, but they need neither the service (closed to
new customers since 2026-07-30) nor its library; `smdebug_hook` writes the library's files for those who have it.
"""
