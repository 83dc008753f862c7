"""lopd inside other libraries: datasets, TRL and Ray; each module needs the library of its name."""
