"""A file or folder for each code of `ckpt check`, with that fault and without: CASES has them all."""

from check_cases import files, sets, values
from check_cases.case import CASES

__all__ = ["CASES", "files", "sets", "values"]
