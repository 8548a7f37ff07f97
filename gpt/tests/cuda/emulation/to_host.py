"""Rewrites a CUDA source for the emulation: launches become calls, dynamic shared memory a pointer.

    to_host.py INPUT.cu OUTPUT.cpp
"""

import re
import sys


def expression_start(text, end):
    """Where the kernel's name that ends at `end` begins: an identifier, perhaps with template arguments."""
    i = end
    while text[i - 1].isspace():
        i -= 1
    if text[i - 1] == ">":
        depth = 0
        while True:
            i -= 1
            depth += (text[i] == ">") - (text[i] == "<")
            if depth == 0:
                break
    while text[i - 1].isalnum() or text[i - 1] == "_":
        i -= 1
    return i


def rewrite(text):
    out, position = "", 0
    while (at := text.find("<<<", position)) >= 0:
        close = text.index(">>>", at)
        start = expression_start(text, at)
        out += text[position:start] + "emulation::launch(" + text[start:at].strip() + ", " + text[at + 3 : close] + ")"
        position = close + 3
    out += text[position:]
    shared = r"auto* \2 = static_cast<\1*>(emulation::dynamic_shared());"
    return re.sub(r"extern __shared__ (\w+) (\w+)\[\];", shared, out)


if __name__ == "__main__":
    source, target = sys.argv[1:]
    with open(source) as file:
        text = rewrite(file.read())
    with open(target, "w") as file:
        file.write(f'#line 1 "{source}"\n' + text)
