"""Training of learned solvers: the AMED predictor and the span solver."""
