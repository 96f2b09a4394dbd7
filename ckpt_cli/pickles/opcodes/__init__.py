"""What each opcode of a pickle does to the machine's stack."""
