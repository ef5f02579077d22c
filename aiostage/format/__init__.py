"""What a checkpoint says and how it is spelled: pure functions on data, without files, event loops or threads.

Read it in this order. Writing: `encode` turns a tree into nodes, `values` spells scalars, `objects` takes everything
else apart by its kind, `layout` decides what goes into which file, `safetensors` writes the headers, `manifest` the
lines that say all the rest. Reading: `lines` and `manifest`, `safetensors`, then `nodes`, the table of what refers to
what, and `decode`, which builds the tree. `parts` cuts files into what is copied and has a digest. `placement` is for
incremental checkpoints only: it says in which checkpoint the bytes of a file lie.

What `objects` knows: `kinds` says what a kind is; `standard_kinds`, `numpy_kinds` and `torch_kinds` have the kinds of
those packages; `classes` is for classes of users, `registry` for registered ones, `packages` for those of common
packages; `tensors` is for subclasses of tensors, `composites` for sparse and quantized ones.

A manifest may be damaged or hostile. Whatever reads it must raise an error for what does not fit, must run no code that
a file names, and must take no more time and memory than the size of the file justifies.

Generators yield between indivisible steps: the caller runs them on its event loop in slices, or in a worker thread.
"""
