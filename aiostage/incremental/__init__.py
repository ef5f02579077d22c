"""Checkpoints that refer to one another: each new one writes what has changed, and names where the rest lies.

A save or load that does not use it calls nothing of this. Its words:

- A *reference* names bytes of a file of another checkpoint of the same run: always where they really lie.
- The *base* is the checkpoint that a new one is compared with, block by block.
- A *reference lock* keeps the base from being removed while a checkpoint that refers to it is written.
- A *tombstone* lies beside a checkpoint that was removed, and whose files others still refer to.

Read first `writing`, how a save writes what has changed; then `references`, how a checkpoint is removed, with the proof
that no reference is left dangling; then `reading`, how a load finds the bytes. Where bytes lie is described by
:mod:`aiostage.format.placement`.
"""
