"""Speed, memory and start-up of shardit against plain diffusers: `python -m bench` (see `__main__`).

| file | what it does |
|---|---|
| `__main__.py` | options; runs the measurements; table, JSON line and result file |
| `model.py` | the Wan-like pipeline that is measured, and its requests |
| `ranks.py`, `worker.py` | rank processes that obey one command at a time, and what they can do |
| `machine.py` | what is written down of the machine; waiting until nobody else computes |
| `speed.py` | plain against two ranks, interleaved; ceiling, bound, share, bit equality |
| `peers.py` | what other libraries offer for the same model and ranks |
| `xdit.py`, `vllm_omni.py`, `vllm_names.py`, `packages.py`, `groups.py` | two of them, made for GPUs, on a CPU |
| `overhead.py` | CPU time that one rank costs over plain diffusers |
| `memory.py` | peak memory and bytes read per rank |
| `startup.py` | time until `Omni` is ready |
| `training.py`, `hand_cut.py` | steps of training over two ranks against one; torch's own pipeline for comparison |
| `schedules.py` | idle share and bytes per step from replayed schedules |
| `report.py` | the table |
"""
