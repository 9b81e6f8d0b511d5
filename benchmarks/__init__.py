"""Time and memory of the losses against PyTorch and against the memory's own speed: `python -m benchmarks`.

README.md says how it is measured. In order of reading: workloads (what is measured), providers (who is measured),
truth (is the answer right), measure (how long, how much memory), floor (how fast it could be), results and machine
(what is kept), report, compare and plot (what is shown), sweeps (workloads in a row).
"""
