"""All compiled code: the batching of `reference`, event for event, without touching sequences that only decode.

Numba's own cache looks at the file of a function alone. `jit` gives it a stamp over all files of this folder, so that
code and constants may be shared between them. Integers only, so equality with the reference is exact. Memory is a few
flat int64 arrays, laid out in `state`; `simulator.pack` fills them and is the only caller.
"""
