"""What `check` looks at: one module a subject, each a table of codes and the function that finds them."""
