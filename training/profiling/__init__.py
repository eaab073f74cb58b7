"""Where the time of a run goes.

    RunClock       clock.py      seconds of waiting, steps, validation        \\
    SystemSampler  system.py     processor, memory, disk, network, GPU (gpu.py) > summary.py -> profile.json
    StepTrace      trace.py      torch's profiler over a few steps            /   -> trace.json.gz

`Profiler` (profiler.py) is the callback that holds them together.
"""
