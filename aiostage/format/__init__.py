"""What a checkpoint says and how it is spelled: pure functions on data, without files, event loops or threads.

Read it in this order. Writing: `encode` turns a tree into nodes, `values` spells scalars, `objects` takes everything
else apart by its kind, `layout` decides what goes into which file, `safetensors` writes the headers, `manifest` the
lines that say all the rest. Reading: `manifest`, `safetensors`, then `nodes`, the table of what refers to what, and
`decode`, which builds the tree. `parts` cuts files into what is copied and has a digest. `placement` is for
incremental checkpoints only: it says in which checkpoint the bytes of a file lie.

Generators yield between indivisible steps: the caller runs them on its event loop in slices, or in a worker thread.
"""
