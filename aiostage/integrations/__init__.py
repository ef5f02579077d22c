"""aiostage for users of other libraries. Each module is one library's, and imports it only when it is imported itself.

`_ranks` and `_generators` serve the trainers: what ranks decide together, and the states of random number generators.
"""
