"""What a compiler got wrong in NVIDIA's machine code, as far as the code alone shows it.

ptxas 12.8 sets registers that a loop keeps for descriptors of wgmma at the end of the loop alone, where its first turn has
long used them: all products but the first of each group then read other rows of shared memory. `undefined` finds such uses.
"""

import re

LINE = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z0-9][\w.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"(\.L_x_\d+):")
PREDICATE = r"!?U?P[T0-9]\w*"
UNIFORM = 1000  # a uniform register's number counts from here


def instructions(sass):
    """[(guarded, opcode, operands)] of ``nvdisasm -c``, and the places of labels."""
    found, labels = [], {}
    for line in sass.splitlines():
        if m := LABEL.match(line):
            labels[m.group(1)] = len(found)
        elif m := LINE.match(line):
            found.append((bool(m.group(1)), m.group(2), m.group(3)))
    return found, labels


def next_places(code, labels):
    """For each instruction those that may follow it."""
    found = []
    for i, (guarded, opcode, operands) in enumerate(code):
        base, after = opcode.split(".")[0], []
        if base in ("BRA", "JMP"):
            target = re.search(r"`\(([^)]+)\)", operands)
            after = [labels[target.group(1)]] if target and target.group(1) in labels else []
        if base not in ("BRA", "JMP", "EXIT", "RET", "BRX", "JMX") or guarded or re.match(PREDICATE, operands):
            after.append(i + 1)
        found.append([x for x in after if x < len(code)])
    return found


def uses(opcode, operands):
    """(read, written): uniform registers, and of a thread's own those that R2UR makes uniform."""
    parts = [x.strip() for x in operands.split(",")]
    read, written, rest = set(), set(), parts
    wide = 4 if ".128" in opcode or re.match(r"LDSM.*\.4", opcode) else 2 if (
        ".64" in opcode or ".WIDE" in opcode or opcode == "CS2R" or re.match(r"LDSM.*\.2", opcode)) else 1
    stores = opcode.startswith(("ST", "RED.", "SYNCS", "UTMA", "UBLK", "BAR"))
    place = 1 if re.fullmatch(PREDICATE, parts[0]) and len(parts) > 1 else 0  # SHFL and others give a predicate first
    if not stores and (m := re.fullmatch(r"(U?)R(\d+)", parts[place])):
        width = wide if m.group(1) == "" or opcode.startswith("U") else 1
        first = int(m.group(2)) + (UNIFORM if m.group(1) else 0)
        written = {first + i for i in range(width)}
        rest = parts[place + 1:]
    in_registers = re.match(r"R\d+, R\d+, gdesc", operands)  # wgmma's first operand: its descriptor is not read
    for kind, number in re.findall(r"(gdesc\[|desc\[|\b)UR(\d+)", ",".join(rest)):
        first = int(number) + UNIFORM
        count = {"gdesc[": range(2 if in_registers else 0, 4), "desc[": range(2)}.get(
            kind, range(2 if opcode.startswith("UIADD3.64") else 1))
        read |= {first + i for i in count}
    if opcode.startswith("R2UR") and (m := re.match(r"R(\d+)", parts[-1])):
        read.add(int(m.group(1)))
    return read, written


def undefined(sass):
    """Instructions that read a uniform register, or make a register uniform, that some way to them leaves unset."""
    code, labels = instructions(sass)
    after, effects = next_places(code, labels), [uses(*x[1:]) for x in code]
    known, work = {0: 0} if code else {}, [0] if code else []  # a bit a register that is set on every way to a place
    while work:
        i = work.pop()
        out = known[i]
        for register in effects[i][1]:
            out |= 1 << register
        for place in after[i]:
            new = known.get(place, out) & out
            if known.get(place) != new:
                known[place] = new
                work.append(place)
    return [f"{code[i][1]} {code[i][2]}" for i in sorted(known) if any(not known[i] >> r & 1 for r in effects[i][0])]
