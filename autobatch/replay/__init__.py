"""What a step allocates, recorded at two batch sizes and replayed at others. No torch, no device.

A recorded :class:`~autobatch.replay.trace.Trace` is a list of allocations and frees. Two of them at different batch
sizes tell how each allocation grows (:mod:`autobatch.replay.scaling`); a model of PyTorch's caching allocator
(:mod:`autobatch.replay.allocator`) is given the list at a size that was never run, and either gets through or runs out
(:mod:`autobatch.replay.forecast`). Kernels that take other workspaces at other sizes make it wrong: it is a
forecast, and the size is run all the same.
"""
