"""The effect of each opcode of a pickle on the machine's stack."""
