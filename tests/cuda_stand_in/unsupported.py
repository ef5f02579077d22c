"""Write a function that refuses, by its name, for everything that the real library exports and this one does not."""

import subprocess
import sys


def names_of(*arguments: str) -> list[str]:
    command = ["nm", "--defined-only", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def exported(path: str) -> set[str]:
    lines = subprocess.run(
        ["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return {line.split()[-1].split("@")[0] for line in lines if " T " in line or " W " in line}


real, *objects = sys.argv[1:]
have = set()
for path in objects:
    lines = subprocess.run(
        ["nm", "--defined-only", path], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    have |= {line.split()[-1] for line in lines if " T " in line}
print("#include <stdio.h>")
print("static int refuse(const char* name) {")
print('    fprintf(stderr, "fakecuda: %s is not implemented\\n", name);')
print("    return 801;\n}")
for name in sorted(exported(real) - have):
    print(f'int {name}() {{ return refuse("{name}"); }}')
