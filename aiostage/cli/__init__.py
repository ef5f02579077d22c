"""The command `aiostage`.

Read in this order. `main` runs one command. `finding` finds what a path leads to, `contents` opens it, and `entries`
describes it, whatever program has written it. `listing` (ls, du), `inspect`, `diff`, `verify` and `bench` are the
commands. `checking` and `checking_foreign` do the work of `verify`, and `report` is their result. `output` prints.
"""
