"""Training in several processes: the process group, the exchange of gradients (replicated or FSDP),
micro-batches, and the launch of the processes.

Imports hardware and what lies below it. Read `process_group.py` first, then `micro_batches.py`.
"""
