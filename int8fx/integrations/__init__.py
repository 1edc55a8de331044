"""int8fx in other libraries: each module here needs its library, and importing it registers us."""
