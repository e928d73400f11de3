"""The AMED predictor and its distillation."""
