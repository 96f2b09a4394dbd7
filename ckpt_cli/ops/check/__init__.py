"""The checks of `check`: one module per subject, each a table of codes and the function that finds them."""
