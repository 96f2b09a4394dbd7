"""The code that the pickles, scripts and archives of a file would run, found and judged without running anything."""
