"""Evidence for the paper's claims: grids of cells, measured once each, and tables of their rows."""
